"""What is waited for, and for how long."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file
from sqlalchemy.exc import IntegrityError, OperationalError

from twinkle.protocol.errors import Unavailable
from twinkle.server.store import retry
from twinkle.server.store.database import Database
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import Session

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EMFILE, "Too many open files", "/a/path"),
    OSError(errno.ENFILE, "Too many open files in system"),
    SafetensorError("Error while serializing: I/O error: Too many open files (os error 24)"),
    OperationalError("INSERT", {}, sqlite3.OperationalError("unable to open database file")),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full")),
    OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked")),
]
LASTING = [
    OSError(errno.EACCES, "Permission denied"),
    ValueError("No space left on device"),
    SafetensorError("Error while deserializing header"),
    OperationalError("SELECT", {}, sqlite3.OperationalError("no such table: runs")),
    IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE constraint failed")),
]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("error", FULL, ids=str)
async def test_what_passes_is_tried_again(error: Exception):
    left = [error, error]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert await retry.retry_while_unavailable(work) == "done"
    left = [error] * 1000
    with pytest.raises(Unavailable, match="can't be written to just now") as refused:
        await retry.retry_while_unavailable(work, give_up_seconds=0.0)
    assert "/a/path" not in refused.value.message


async def test_a_database_that_is_gone_is_waited_for():
    left = [DatabaseGone("not where it was", retry_after=5.0)]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert await retry.retry_while_unavailable(work) == "done"
    left = [DatabaseGone("not where it was", retry_after=5.0)] * 1000
    with pytest.raises(Unavailable, match="not where it was") as raised:
        await retry.retry_while_unavailable(work, give_up_seconds=0.0)
    assert raised.value.retry_after == 5.0


@pytest.mark.parametrize("error", LASTING, ids=str)
async def test_what_does_not_pass_is_raised_at_once(error: Exception):
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)):
        await retry.retry_while_unavailable(work)
    assert calls == 1


async def test_writes_wait_while_this_process_may_open_no_more_files(tmp_path: Path):
    """What the libraries really say then."""
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.engine.dispose()  # the next write opens the file again
    tensors = {"a": np.zeros(3, np.float32)}
    works: list[Callable[[], object]] = [
        lambda: (tmp_path / "manifest.json").write_text("{}", encoding="utf-8"),
        lambda: save_file(tensors, tmp_path / "a.safetensors"),
        lambda: database.put(Session(id="s", tenant="t", created_at=0.0)),
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for work in works:
        held = [open(os.devnull, encoding="utf-8") for _ in range(3)]  # noqa: SIM115
        tries = 0

        def full_at_first(work: Callable[[], object] = work) -> object:
            nonlocal tries
            tries += 1
            if tries > 2:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return work()

        resource.setrlimit(resource.RLIMIT_NOFILE, (max(file.fileno() for file in held) + 1, hard))
        try:
            await retry.retry_while_unavailable(full_at_first)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for file in held:
                file.close()
        assert tries == 3
    assert database.session("t", "s") is not None
    database.close()
