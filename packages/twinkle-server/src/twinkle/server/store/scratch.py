"""Directories of this machine for files on their way to or from a file system elsewhere.

ROOT/lock       held while a directory is made, or deleted for another process
ROOT/XXXXXXXX/  of one process, which holds a lock on it while it lives; then the next one deletes it
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from twinkle.server.store.private import private_directory


class Scratch:
    """Thread-safe. Nobody but the server's user can read what lies here."""

    def __init__(self, root: Path) -> None:
        private_directory(root)
        with (root / "lock").open("a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            _delete_leftovers(root)
            self._directory = Path(tempfile.mkdtemp(dir=root))
            self._held = os.open(self._directory, os.O_RDONLY)
            fcntl.flock(self._held, fcntl.LOCK_EX)

    @contextmanager
    def directory(self) -> Generator[Path]:
        """An empty directory that lasts as long as the context."""
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _delete_leftovers(root: Path) -> None:
    """Delete the directories of processes that have ended."""
    for path in root.iterdir():
        if not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(BlockingIOError):  # its process lives
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
