"""What is waited for, and for how long."""

from __future__ import annotations

import errno
import sqlite3

import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import IntegrityError, OperationalError

from twinkle.protocol.errors import Unavailable
from twinkle.server.store import patience
from twinkle.server.store.patience import DatabaseGone

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
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
    monkeypatch.setattr(patience, "_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("error", FULL, ids=str)
async def test_what_passes_is_tried_again(error: Exception):
    left = [error, error]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert await patience.patiently(work) == "done"
    left = [error] * 1000
    with pytest.raises(Unavailable, match="can't be written to just now"):
        await patience.patiently(work, patience_seconds=0.0)


async def test_a_database_that_is_gone_is_waited_for():
    left = [DatabaseGone("not where it was", retry_after=5.0)]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert await patience.patiently(work) == "done"
    left = [DatabaseGone("not where it was", retry_after=5.0)] * 1000
    with pytest.raises(Unavailable, match="not where it was") as raised:
        await patience.patiently(work, patience_seconds=0.0)
    assert raised.value.retry_after == 5.0


@pytest.mark.parametrize("error", LASTING, ids=str)
async def test_what_does_not_pass_is_raised_at_once(error: Exception):
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)):
        await patience.patiently(work)
    assert calls == 1
