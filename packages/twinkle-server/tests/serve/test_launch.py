"""What the launcher says of who may come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twinkle.server.config import ServerConfig, parse_config
from twinkle.server.keys import create_key, revoke_key, with_auth_mode
from twinkle.server.serve.launch import _access_lines
from twinkle.server.store.database import Database


def config(tmp_path: Path, mode: str | None = None, **server: Any) -> ServerConfig:
    values = {"model": {"model_id": "x"}, "server": server, "storage": {"root": str(tmp_path)}}
    return parse_config({**values, "auth": {"mode": mode}})


@pytest.mark.parametrize(
    ("mode", "server", "first", "warning"),
    [
        ("open", {}, "Open mode", ""),
        ("open", {"host": "localhost"}, "Open mode", ""),
        ("open", {"host": "::1"}, "Open mode", ""),
        ("open", {"host": "0.0.0.0"}, "Open mode", "WHOEVER REACHES 0.0.0.0:8000"),
        ("open", {"host": "gpu-7"}, "Open mode", "WHOEVER REACHES gpu-7:8000"),
        ("keys", {}, "Only keys", ""),
        ("keys", {"host": "0.0.0.0"}, "Only keys", "in the clear"),
        ("keys", {"host": "0.0.0.0", "tls_certificate": "a", "tls_key": "b"}, "Only keys", ""),
    ],
)
def test_what_is_open_to_others_is_said_loudly(
    tmp_path: Path, mode: str, server: dict[str, Any], first: str, warning: str
):
    lines = _access_lines(config(tmp_path, mode, **server))
    assert lines[0].startswith(first)
    assert len(lines) == 1 + bool(warning) and warning in lines[-1]


def test_the_mode_follows_from_the_keys_that_there_are_at_the_start(tmp_path: Path):
    assert with_auth_mode(config(tmp_path)).auth.mode == "open"
    database = Database(config(tmp_path).storage.url)
    row, _ = create_key(database)
    assert with_auth_mode(config(tmp_path)).auth.mode == "keys"
    assert with_auth_mode(config(tmp_path, "open")).auth.mode == "open"
    revoke_key(database, row.id)  # to take the last one away is not to let everybody in
    assert with_auth_mode(config(tmp_path)).auth.mode == "keys"
    assert with_auth_mode(config(tmp_path, "keys")).auth.mode == "keys"
