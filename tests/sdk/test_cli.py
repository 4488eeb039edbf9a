"""The `tinker` command line, a program of its own: it needs two environment variables and no patch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from forked_programs import ForkedPrograms
from tinker_sdk import MODEL, SDK_VERSION, Sdk


@pytest.fixture(params=["unpatched"])
def sdk(
    request, base_url, monkeypatch
):  # the SDK in this process only prepares what the command line looks at
    monkeypatch.setenv("TINKER_BASE_URL", base_url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-command-line")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return Sdk(False, base_url)


class CommandLine:
    """Its commands, started with what it imports there already; `alone` starts it as a user does."""

    def __init__(self, forked: ForkedPrograms) -> None:
        self._forked = forked

    def __call__(self, *arguments: str, check: bool = True) -> str:
        done = self._forked.run(*arguments, COLUMNS="200")
        return self._said(done, check)

    def alone(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "tinker.cli", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"}
        )
        return self._said(done, True)

    def json(self, *arguments: str) -> dict:
        return json.loads(self("-f", "json", *arguments))

    def _said(self, done: subprocess.CompletedProcess[str], check: bool) -> str:
        assert (done.returncode == 0) == check, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + (done.stderr if not check else "")


@pytest.fixture(scope="module")
def tinker_cli() -> Iterator[CommandLine]:
    programs = ForkedPrograms("tinker.cli", ["tinker", "tinker.cli.commands.checkpoint"])
    yield CommandLine(programs)
    programs.close()


def test_runs_models_and_accounts(train, tinker_cli: CommandLine):
    client = train()
    client.save_state("seen").result()
    assert "0." in tinker_cli.alone("version")
    if SDK_VERSION >= (0, 36):
        assert MODEL in tinker_cli("model", "list")
        assert "Tinker accessible: yes" in tinker_cli("auth", "status")
        assert tinker_cli.json("billing", "checkpoint-storage")["data"]
        assert "t-" in tinker_cli("auth", "whoami")
    assert client.model_id in tinker_cli.alone("-f", "json", "run", "list")
    assert client.model_id in tinker_cli("-f", "json", "run", "list")
    assert client.model_id in tinker_cli("-f", "json", "run", "info", client.model_id)
    assert "Error" in tinker_cli("run", "info", "no-such-run:train:0", check=False)


def test_checkpoints(train, tinker_cli: CommandLine, tmp_path: Path):
    client = train(rank=2)
    path = client.save_state("from-cli").result().path
    assert path in tinker_cli("-f", "json", "checkpoint", "list", "--run-id", client.model_id)
    assert path in tinker_cli("-f", "json", "checkpoint", "list")
    assert path in tinker_cli("-f", "json", "checkpoint", "info", path)
    tinker_cli("checkpoint", "publish", path)
    assert '"public": true' in tinker_cli("-f", "json", "checkpoint", "info", path)
    tinker_cli("checkpoint", "unpublish", path)
    tinker_cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    assert '"public": false' in tinker_cli("-f", "json", "checkpoint", "info", path)
    tinker_cli("checkpoint", "set-ttl", path, "--remove")
    tinker_cli("checkpoint", "download", path, "--output", str(tmp_path / "out"))
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))
    assert list((tmp_path / "out").rglob("adapter_config.json"))
    tinker_cli("checkpoint", "delete", path, "--yes")
    assert "Error" in tinker_cli("checkpoint", "info", path, check=False)


def test_what_is_missing_is_said(train, tinker_cli: CommandLine):
    session_id = train().model_id.split(":")[0]
    assert "records no traces" in tinker_cli("session", "export-trace", session_id, check=False)


@pytest.mark.since(0, 36)
def test_usage_is_shown(train, tinker_cli: CommandLine):
    session_id = train().save_state("billed").result().path.split("/")[2].split(":")[0]
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    tomorrow = today + timedelta(days=1)
    shown = tinker_cli.json("billing", "usage", today.isoformat(), tomorrow.isoformat())
    assert session_id in json.dumps(shown)
