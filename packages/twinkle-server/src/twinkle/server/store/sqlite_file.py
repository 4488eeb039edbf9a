"""The file of a SQLite database, watched while it is open.

SQLite goes on with a file that was moved, deleted or replaced: all that is written then is gone when the process ends.
Worse, what it had not put into the file itself yet stays at the old path, in the write-ahead log, and whatever file is
opened there next gets it mixed into its own pages. So nothing is read or written while another file, or none, is at the
path; what there is in the log is put into the file that it belongs to, wherever that is now; and a copy is made, since
there may be no other.
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

# How long transactions in progress have to end before the log can be emptied.
_BUSY_SECONDS = 1.0

_COPY = ".rescued-"


def check_not_lost(path: Path) -> None:
    """
    Raises:
        InvalidRequest: if there is no file, and an earlier process has noticed that it went: nobody wants an empty one.
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
    """Knows whether the file that was opened is still at its path. Called by any thread."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of a database that there is.
        """
        self._path = path.absolute()
        self._log = Path(f"{self._path}-wal")
        self._guard = threading.Lock()
        # Of its own, since the pool's connections may come and go, and a new one would open whatever is there. As long
        # as it is open no other connection can take the log away.
        self._connection = sqlite3.connect(
            self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # Only what is read is opened.
        self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        self._opened = self._files()
        self._is_gone = False
        self._left: _Stamp | None = None  # how the file was left when it went, once its log is in it
        self._copy: Path | None = None

    def check(self) -> None:
        """
        Raises:
            DatabaseGone: if another file is at the path, or none.
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
            self.check()  # the last time that its log can be emptied
        self._connection.close()

    def _files(self) -> tuple[_Stamp | None, _Stamp | None]:
        """Which files are at the two paths."""
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
        """Put what the write-ahead log has into the file that was opened. If that can't be, it is tried again."""
        try:
            is_busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            log.error("what was written to the database %s last is still in its log: %s", self._path, error)
            return
        if not is_busy:
            self._left = _content_of_open(self._opened[0])

    def _is_back(self) -> None:
        if not self._is_gone:
            return  # another thread has noticed before
        self._is_gone, self._left = False, None
        if self._copy is not None:
            self._copy.unlink(missing_ok=True)  # the file has all of it
            self._copy = None
        log.warning("the database %s is back: the server goes on with it", self._path)


def _identity(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:  # or it can't be reached: then SQLite couldn't either
        return None
    return found.st_dev, found.st_ino


def _content_of_open(identity: _Stamp | None) -> _Stamp:
    """What changes when the content does, of a file that this process has open, wherever it is now."""
    for name in os.listdir("/dev/fd"):
        # Not by opening it: to close any descriptor of a file would give up the locks that SQLite has on it.
        with contextlib.suppress(OSError):
            found = os.fstat(int(name))
            if (found.st_dev, found.st_ino) == identity:
                return found.st_size, found.st_mtime_ns
    raise AssertionError("the connection has the file open")
