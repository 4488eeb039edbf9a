"""`twinkle-server keys`: made once, shown once, listed, revoked."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from twinkle.protocol.errors import TwinkleError
from twinkle.server.cli import app


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "server_config.yaml"
    path.write_text(f"model: {{model_id: x}}\nstorage: {{root: {tmp_path / 'storage'}}}\n")
    return str(path)


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_a_key_is_shown_once_listed_without_itself_and_revoked(config: str, tmp_path: Path):
    key, said = run("create", "--config", config, "--tenant", "lab", "--role", "admin", "--label", "anna's")
    assert key.startswith("tml-") and len(key.strip()) == 47
    assert "Key 1 of tenant lab" in said and key.strip() not in said
    run("create", "--config", config)
    listed, _ = run("list", "--config", config)
    assert [line.split()[:3] for line in listed.splitlines()[:2]] == [
        ["ID", "TENANT", "ROLE"],
        ["1", "lab", "admin"],
    ]
    assert "anna's" in listed and key.strip() not in listed
    written = b"".join(path.read_bytes() for path in (tmp_path / "storage").glob("twinkle.sqlite*"))
    assert key.strip().encode() not in written and b"lab" in written
    assert run("revoke", "1", "--config", config) == ("Key 1 of tenant lab is revoked.\n", "")
    assert "the last one" in run("revoke", "2", "--config", config)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--tenant", "no spaces"), "'no spaces' is no name for one"),
        (("create", "--tenant", "x" * 65), "up to 64"),
        (("create", "--label", "x" * 257), "at most 256"),
        (("revoke", "7"), "there is none with that id"),
    ],
)
def test_what_is_wrong_is_said(config: str, arguments: tuple[str, ...], message: str):
    with pytest.raises(TwinkleError, match=message):
        run(*arguments, "--config", config)
