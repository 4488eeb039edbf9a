"""Where checkpoints and run snapshots are kept: a directory of this machine, or any file system that fsspec knows.

A *place* is a relative path with `/` between its parts. Its parts are the server's own names, or have been checked by
`uris`: none of them is a path. A file or folder that can be seen is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

# No write takes so long: what is unfinished and older was left by a process that was killed.
LEFTOVER_SECONDS = 86_400.0


class Files(Protocol):
    """Blocking, and thread-safe. Each method raises `FilesAway` if the file system can't be reached; those that read
    raise `FileNotFoundError` if there is nothing at the place, and `OSError` if it can't be read.
    """

    def below(self, place: str) -> Files:
        """The same file system, beginning at a place."""
        ...

    def new_folder(self, place: str) -> AbstractContextManager[Path]:
        """A local directory to write files in, which becomes the folder at `place` when the context ends without an
        error, instead of one that was there. Durable then.
        """
        ...

    def folder(self, place: str) -> AbstractContextManager[Path]:
        """A local directory with the folder's files, to read."""
        ...

    def has_folder(self, place: str) -> bool: ...

    def look(self, place: str, name: str) -> tuple[bytes, dict[str, int]]:
        """One file's content, and the sizes in bytes of all files in the folder at that moment."""
        ...

    def read(self, place: str, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file in a folder, from `offset` on, at most `size` of them (None: all)."""
        ...

    def url(self, place: str, name: str) -> str:
        """Where a file of a folder is, for those that can reach the file system themselves."""
        ...

    def delete_folder(self, place: str) -> None:
        """Delete a folder, if it is there."""
        ...

    def delete_leftovers(self) -> None:
        """Delete what was left of folders by processes that were killed while they wrote them."""
        ...

    def new_file(self, place: str) -> AbstractContextManager[Path]:
        """A local path to write to, which becomes the file at `place` when the context ends without an error."""
        ...

    def file(self, place: str) -> AbstractContextManager[Path]:
        """A local path to read the file at `place` from."""
        ...

    def delete_file(self, place: str) -> None:
        """Delete a file, if it is there."""
        ...

    def names(self, place: str) -> list[str]:
        """What is directly below a place, in any order; nothing if there is no such place."""
        ...

    def delete(self, place: str) -> None:
        """Delete everything below a place."""
        ...


class LocalFiles:
    """A directory. What is new is written beside its place and renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # A directory can't be renamed over another: for a moment the replaced one is gone and the new one not yet
        # there. The lock is held meanwhile, so that nobody finds files missing.
        self._replacing = threading.Lock()

    def below(self, place: str) -> LocalFiles:
        return LocalFiles(self._root / place)

    # ------------------------------------------------------------ folders

    @contextmanager
    def new_folder(self, place: str) -> Generator[Path]:
        target = self._root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
        try:
            partial.mkdir()
            yield partial
            for path in partial.iterdir():
                _flush(path)
            self._replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _replace(self, partial: Path, target: Path) -> None:
        if not target.exists():
            os.rename(partial, target)
            return
        old = partial.with_suffix(".old")
        with self._replacing:
            os.rename(target, old)
            os.rename(partial, target)
        shutil.rmtree(old)

    @contextmanager
    def folder(self, place: str) -> Generator[Path]:
        yield self._root / place

    def has_folder(self, place: str) -> bool:
        with self._replacing:
            return (self._root / place).is_dir()

    def look(self, place: str, name: str) -> tuple[bytes, dict[str, int]]:
        folder = self._root / place
        with self._replacing:
            content = (folder / name).read_bytes()
            return content, {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}

    def read(self, place: str, name: str, offset: int = 0, size: int | None = None) -> bytes:
        with self._replacing:
            file = (self._root / place / name).open("rb")  # stays the same, whatever takes its place
        with file:
            file.seek(offset)
            return file.read(-1 if size is None else size)

    def url(self, place: str, name: str) -> str:
        return (self._root / place / name).resolve().as_uri()

    def delete_folder(self, place: str) -> None:
        shutil.rmtree(self._root / place, ignore_errors=True)

    def delete_leftovers(self) -> None:
        for partial in self._root.rglob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):  # its writer is done
                if time.time() - partial.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)

    # ------------------------------------------------------------ files

    @contextmanager
    def new_file(self, place: str) -> Generator[Path]:
        target = self._root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        try:
            yield partial
            _flush(partial)
            os.replace(partial, target)
            _flush(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def file(self, place: str) -> Generator[Path]:
        yield self._root / place

    def delete_file(self, place: str) -> None:
        (self._root / place).unlink(missing_ok=True)

    def names(self, place: str) -> list[str]:
        directory = self._root / place
        return [path.name for path in directory.iterdir()] if directory.is_dir() else []

    def delete(self, place: str) -> None:
        shutil.rmtree(self._root / place, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make what was written to a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
