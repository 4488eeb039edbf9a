"""A real server that checks keys, by the real SDK and by the native client."""

import subprocess
import sys
import time

import httpx
import pytest
import running_server
from peft_reference import MODEL
from tinker_sdk import now

from twinkle.protocol.errors import Unauthorized
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

# How long a revoked key may go on working.
REVOKED_SECONDS = 10


def keys(*arguments: str) -> str:
    command = [sys.executable, "-m", "twinkle.server", "keys", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_keys_are_checked_for_the_sdk_and_the_native_client(hub_root, tmp_path, monkeypatch):
    port = running_server.free_port()
    tinker = pytest.importorskip("tinker")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    for name in ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "TINKER_PROJECT_ID", "TINKER_TAGS"):
        monkeypatch.delenv(name, raising=False)
    config = running_server.write_config(tmp_path, port)
    key = keys("create", "--config", str(config), "--tenant", "lab")
    server = running_server.start(config, hub_root, port)
    try:
        said = "".join(server.lines)
        assert "Only keys are let in" in said and "Open mode" not in said

        sdk = now(
            tinker.ServiceClient(base_url=server.base_url, api_key=key).create_lora_training_client(
                MODEL, rank=2
            )
        )
        path = sdk.save_state("shared").result().path
        other = keys("create", "--config", str(config), "--tenant", "lab")  # while the server runs
        with ServiceClient(server.base_url, api_key=other) as colleague:
            listed = colleague.create_rest_client().list_user_checkpoints().checkpoints
            assert [checkpoint.tinker_path for checkpoint in listed] == [path]

        for wrong in ("tml-wrong", ""):
            with (
                ServiceClient(server.base_url, api_key=wrong) as client,
                pytest.raises(Unauthorized, match="key"),
            ):
                client.create_lora_training_client(MODEL, rank=2)
        with pytest.raises(tinker.AuthenticationError):
            tinker.RestClient(base_url=server.base_url, api_key="tml-wrong").list_training_runs().result()

        keys("revoke", "1", "--config", str(config))
        wait_until_refused(server.base_url, key)
        with pytest.raises((tinker.AuthenticationError, ValueError), match=r"revoked|not valid"):
            sdk.save_state("late").result(timeout=60)
        headers = {"X-API-Key": other}
        assert httpx.get(f"{server.base_url}/api/v1/checkpoints", headers=headers).status_code == 200
        assert not any(secret in line for line in server.lines for secret in (key, other, "tml-wrong"))
    finally:
        server.stop()


def wait_until_refused(base_url: str, key: str) -> None:
    deadline = time.monotonic() + REVOKED_SECONDS
    while httpx.get(f"{base_url}/api/v1/sessions", headers={"X-API-Key": key}).status_code != 401:
        assert time.monotonic() < deadline, "the revoked key still works"
        time.sleep(0.2)
