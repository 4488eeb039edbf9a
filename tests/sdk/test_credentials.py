"""Keys of any form without a patch: a command prints one, and the server gives a token for it."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import jwt
import pytest

PROGRAM = """
import tinker
from tinker import types
client = tinker.ServiceClient()
training = client.create_lora_training_client("Qwen/Qwen3.5-4B", rank=2)
training = training.result() if hasattr(training, "result") else training
print("RUN", training.model_id)
rest = client.create_rest_client()
print("LISTED", [run.training_run_id for run in rest.list_training_runs().result().training_runs])
"""


def run(base_url: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    settings = {"TINKER_BASE_URL": base_url, "TINKER_TELEMETRY": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env={**kept, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("malformed_key", [None, "no prefix at all"])
def test_a_credential_command_lets_any_key_through(base_url: str, malformed_key: str | None):
    more = {} if malformed_key is None else {"TINKER_API_KEY": malformed_key}
    said = run(base_url, TINKER_CREDENTIAL_CMD="echo 'my very own key'", **more)
    run_id = said.split()[1]
    # It is the same tenant as the key itself, whoever sends it.
    found = httpx.get(
        f"{base_url}/api/v1/training_runs/{run_id}", headers={"X-API-Key": "my very own key"}, timeout=30
    )
    assert found.status_code == 200
    assert run_id in said.partition("LISTED")[2]
    other = httpx.get(
        f"{base_url}/api/v1/training_runs/{run_id}", headers={"X-API-Key": "another"}, timeout=30
    )
    assert other.status_code == 404


def test_a_token_is_a_jwt_of_the_keys_tenant_and_no_other_is_taken(base_url: str):
    def get(key: str) -> httpx.Response:
        return httpx.get(f"{base_url}/api/v1/auth/apikey/me", headers={"X-API-Key": key}, timeout=30)

    reply = httpx.post(f"{base_url}/api/v1/auth/token", json={}, headers={"X-API-Key": "k"}, timeout=30)
    token = reply.json()["jwt"]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == 3600
    assert get(token).json() == get("k").json()
    forged = jwt.encode({**claims, "sub": "t-somebody"}, "x" * 32, "HS256")
    refused = get(forged)
    assert refused.status_code == 401
    assert 'error="invalid_token"' in refused.headers["WWW-Authenticate"]
    unsigned = jwt.encode(claims, None, "none")  # pyright: ignore[reportArgumentType]
    assert get(unsigned).status_code == 401
