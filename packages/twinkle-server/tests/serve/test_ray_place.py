"""The environment that a start of Ray gets: its own token and place, whatever is set for others. No Ray is started."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from twinkle.protocol.errors import ServerFault
from twinkle.server.serve import ray_place
from twinkle.server.serve.ray_place import place, ray_environment

HOSTILE = {
    "RAY_ADDRESS": "10.0.0.1:6379",
    "RAY_AUTH_MODE": "disabled",
    "RAY_AUTH_TOKEN": "known to others",
    "RAY_AUTH_TOKEN_PATH": "/somewhere/else",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    "RAY_TMPDIR": "/tmp/ray",
    "RAY_NAMESPACE": "theirs",
    "KEPT": "as it is",
    "RAY_worker_niceness": "7",
}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_each_start_has_a_token_that_nobody_else_can_read(umask: int):
    before = os.umask(umask)
    try:
        with ray_environment({}) as first, ray_environment({}) as second:
            paths = [Path(environment["RAY_AUTH_TOKEN_PATH"]) for environment in (first, second)]
            assert [mode(path) for path in paths] == [0o600, 0o600]
            assert [mode(path.parent) for path in paths] == [0o700, 0o700]
            tokens = {path.read_text() for path in paths}
            assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)
    finally:
        os.umask(before)
    assert not any(path.parent.exists() for path in paths)


def test_nothing_that_is_set_for_others_counts():
    with ray_environment(HOSTILE) as environment:
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert Path(environment["RAY_AUTH_TOKEN_PATH"]).parent.name.startswith("twinkle-ray-")
        assert {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "RAY_NAMESPACE"}.isdisjoint(environment)
        assert environment["KEPT"] == "as it is" and environment["RAY_worker_niceness"] == "7"


def test_a_process_with_the_environment_knows_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TWINKLE_RAY_PLACE", raising=False)
    assert place() is None
    with ray_environment({}) as environment:
        monkeypatch.setenv("TWINKLE_RAY_PLACE", environment["TWINKLE_RAY_PLACE"])
        found = place()
        assert found is not None and found.is_dir()


@pytest.mark.parametrize("length", [40, 90, 200])
def test_a_long_place_for_temporary_files_is_not_used_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
):
    long = tmp_path / ("x" * length)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with ray_environment({"TMPDIR": str(long)}) as environment:
        directory = Path(environment["RAY_AUTH_TOKEN_PATH"]).parent
        of_ray = f"{directory}/r/session_2026-11-30_20-24-10_206472_1234567/sockets/plasma_store"
        of_ranks = f"{environment['TMPDIR']}/twinkle-12345678/calls"
        assert max(len(of_ray), len(of_ranks)) <= 103


def test_without_any_place_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    def nowhere(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ray_place.tempfile, "mkdtemp", nowhere)
    with pytest.raises(ServerFault, match=r"/tmp: Permission denied.*set TMPDIR"), ray_environment({}):
        pass


def test_what_a_killed_start_has_left_goes_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_place, "_LONGEST_SOCKET", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "twinkle-ray-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "token").write_text("old")
    unknown = tmp_path / "twinkle-ray-unknown"  # somebody is about to lock it
    unknown.mkdir()
    with ray_environment({}) as first:
        assert not left.exists() and unknown.exists()
        with ray_environment({}):
            assert Path(first["RAY_AUTH_TOKEN_PATH"]).exists()
