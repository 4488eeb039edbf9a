"""Notices when the file of an open SQLite database is moved, deleted or replaced.

SQLite keeps writing to the old file, so those writes are lost when the process ends. Worse, the write-ahead log stays
at the old path, and SQLite would mix it into whatever database is opened there next. So while the path has another
file, or none, nothing is read or written, the log is checkpointed into the file it belongs to, wherever that is now,
and a copy is made, since the file itself may be deleted.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import sqlite3
import threading
import uuid
from pathlib import Path
from typing import TypeAlias

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.store.retry import DatabaseGone

log = logging.getLogger("twinkle.server")

_Stamp: TypeAlias = tuple[int, ...]

# How long to wait for transactions in progress, which keep the log from being emptied.
_BUSY_SECONDS = 1.0

_COPY = ".rescued-"


def check_not_lost(path: Path) -> None:
    """
    Raises:
        InvalidRequest: if the file is missing and an earlier process left a copy; an empty database would hide that.
    """
    if path.exists():
        return
    copies = list(path.parent.glob(f"{glob.escape(path.name)}{_COPY}*"))
    if copies:
        newest = max(copies, key=lambda copy: copy.stat().st_mtime)
        raise InvalidRequest(
            f"storage: the database {path} went away while a server ran on it, and is not back; put it back, or move "
            f"{newest.name} there, which has all that was in it; to begin with an empty one, delete the copies"
        )


class SqliteFile:
    """Checks that the file that was opened is still at its path. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of an existing database.
        """
        self._path = path.absolute()
        self._log = Path(f"{self._path}-wal")
        self._guard = threading.Lock()
        # The pool's connections come and go, and a new one would open whatever is at the path by then. While this one
        # is open, no other connection can delete the log.
        self._connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # SQLite opens a file only when it is first read.
        self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._opened = self._files()
        self._is_gone = False
        self._left: _Stamp | None = None  # size and time of the moved file after its log was emptied
        self._copy: Path | None = None

    def check(self) -> None:
        """
        Raises:
            DatabaseGone: if the path has another file, or none.
        """
        if self._files() == self._opened and not self._is_gone:
            return
        with self._guard:
            if self._files() == self._opened and self._left in (None, _content_of_open(self._opened[0])):
                self._is_back()
                return
            if not self._is_gone:
                self._goes()
            if self._left is None:
                self._empty_log()
        raise DatabaseGone(
            "the server's database is not where it was: nothing was changed; try again later", retry_after=5.0
        )

    def close(self) -> None:
        with contextlib.suppress(DatabaseGone):
            self.check()  # last chance to empty the log
        self._connection.close()

    def _files(self) -> tuple[_Stamp | None, _Stamp | None]:
        """The files now at the two paths."""
        return _identity(self._path), _identity(self._log)

    # ------------------------------------------------------------ gone, and back

    def _goes(self) -> None:
        self._is_gone = True
        is_missing = _identity(self._path) is None
        what = "was moved or deleted" if is_missing else "or its -wal is another file than was opened"
        copied = "no copy could be made"
        copy = self._path.with_name(f"{self._path.name}{_COPY}{uuid.uuid4().hex[:8]}")
        try:
            self._connection.execute("VACUUM INTO ?", (str(copy),))
        except sqlite3.Error as error:
            log.error("the database %s could not be copied: %s", self._path, error)
            copy.unlink(missing_ok=True)
        else:
            self._copy, copied = copy, f"a copy of all that was in it is {copy}"
        log.error(
            "the database %s %s, and the server runs on it; %s. What needs it waits, or is answered 503. Put that very "
            "file back, unchanged (mv, not cp), and the server goes on by itself; or end the server, put there the "
            "copy or the database that you want, and start it again.",
            self._path,
            what,
            copied,
        )

    def _empty_log(self) -> None:
        """Checkpoint the write-ahead log into the file that was opened; `check` tries again if that fails."""
        try:
            is_busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            log.error("what was written to the database %s last is still in its log: %s", self._path, error)
            return
        if not is_busy:
            self._left = _content_of_open(self._opened[0])

    def _is_back(self) -> None:
        if not self._is_gone:
            return  # another thread was first
        self._is_gone, self._left = False, None
        if self._copy is not None:
            self._copy.unlink(missing_ok=True)
            self._copy = None
        log.warning("the database %s is back: the server goes on with it", self._path)


def _identity(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:  # missing or unreachable
        return None
    return found.st_dev, found.st_ino


def _content_of_open(identity: _Stamp | None) -> _Stamp:
    """Size and modification time of a file that this process has open, wherever it is now."""
    for name in os.listdir("/dev/fd"):
        # Don't open the file: closing any descriptor of it would release SQLite's locks (POSIX).
        with contextlib.suppress(OSError):
            found = os.fstat(int(name))
            if (found.st_dev, found.st_ino) == identity:
                return found.st_size, found.st_mtime_ns
    raise AssertionError("the connection has the file open")
