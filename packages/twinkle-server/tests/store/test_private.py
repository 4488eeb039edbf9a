"""What the server keeps is for its user alone, whatever the umask, and also where it was otherwise before."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from twinkle.server.app import build_signer
from twinkle.server.config import parse_config
from twinkle.server.store.database import Database
from twinkle.server.store.private import private_directory, private_file


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directories_and_files_are_made_or_tightened(tmp_path: Path):
    for name in ("new", "old"):
        directory, file = tmp_path / name, tmp_path / name / "file"
        if name == "old":
            directory.mkdir(mode=0o755)
            file.write_text("content")
            file.chmod(0o664)
        private_directory(directory)
        private_file(file)
        assert (mode(directory), mode(file)) == (0o700, 0o600)
    assert (tmp_path / "old" / "file").read_text() == "content"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_database_and_its_log_are_for_its_user_alone(tmp_path: Path, is_there: bool):
    path = tmp_path / "some.sqlite"
    if is_there:
        Database(f"sqlite:///{path}").close()
        path.chmod(0o644)
    database = Database(f"sqlite:///{path}")
    modes = {file.name: mode(file) for file in tmp_path.iterdir()}
    database.close()
    assert modes["some.sqlite"] == 0o600 and set(modes.values()) == {0o600}


def test_a_second_opening_takes_no_lock_away(tmp_path: Path):
    path = tmp_path / "some.sqlite"
    first = Database(f"sqlite:///{path}")
    holding = sqlite3.connect(path, isolation_level=None)
    holding.execute("BEGIN IMMEDIATE")
    Database(f"sqlite:///{path}").close()
    other = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    import subprocess
    import sys

    assert subprocess.run(
        [sys.executable, "-c", other, str(path)], capture_output=True, check=False
    ).returncode
    holding.close()
    first.close()


def test_the_storage_and_its_secret_are_for_the_servers_user_alone(tmp_path: Path):
    root = tmp_path / "storage"
    root.mkdir(mode=0o755)
    (root / "secret").write_text("a" * 64)
    (root / "secret").chmod(0o644)
    config = parse_config({"model": {"model_id": "x"}, "storage": {"root": str(root)}})
    build_signer(config)
    assert (mode(root), mode(root / "secret")) == (0o700, 0o600)
