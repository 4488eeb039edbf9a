"""Retrying while the store is unavailable: its disk is full, its database is locked or gone, its files can't be
reached, or this process has too many open files.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import OperationalError

from twinkle.protocol.errors import Unavailable, words_of

T = TypeVar("T")

log = logging.getLogger("twinkle.server")

GIVE_UP_SECONDS = 600.0
_PAUSE_SECONDS = 1.0


class StoreGone(Unavailable):
    """A part of the store is not there; it may come back."""


class DatabaseGone(StoreGone):
    """The database's file is not at its path, or its server can't be reached."""


class FilesAway(StoreGone):
    """The file system of checkpoints and run snapshots can't be reached."""


# No space left, or too many open files.
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
# Errors passed through a library have their number only in words. SQLite can't reopen a file if the process has too
# many open files (a missing file is `DatabaseGone`).
_SIGNS = (
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",
    "database is locked",
    "Too many open files",
    "unable to open database file",
)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: there is space again, the lock is gone, or the database is back."""
    if isinstance(error, StoreGone) or (isinstance(error, OSError) and error.errno in _TRANSIENT):
        return True
    is_of_store = isinstance(error, OSError | OperationalError) or type(error).__name__ == "SafetensorError"
    return is_of_store and any(sign in str(error) for sign in _SIGNS)


def unavailable(error: BaseException) -> Unavailable:
    """The error for a caller that would have to wait."""
    if isinstance(error, StoreGone):
        return Unavailable(error.message, error.retry_after)
    reason = words_of(getattr(error, "orig", None) or error).splitlines()[0][:200]
    return Unavailable(
        f"the server's storage can't be written to just now ({reason}): nothing was changed; try again later",
        retry_after=5.0,
    )


async def retry_while_unavailable(work: Callable[[], T], give_up_seconds: float = GIVE_UP_SECONDS) -> T:
    """The result of blocking `work`, run in a thread, and retried while it fails with transient errors.

    Raises:
        Unavailable: if that takes too long.
    """
    give_up = time.monotonic() + give_up_seconds
    is_logged = False
    while True:
        try:
            return await asyncio.to_thread(work)
        except Exception as error:
            if not is_transient(error):
                raise
            if time.monotonic() > give_up:
                raise unavailable(error) from error
            if not is_logged:
                log.warning("waiting for the storage: %s", error)
                is_logged = True
        await asyncio.sleep(_PAUSE_SECONDS)
