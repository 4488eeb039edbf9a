"""Checkpoints and run snapshots on a file system that fsspec knows, such as an object store.

    PLACE/current         the name of the generation that counts
    PLACE/GENERATION/...  the files of a folder

Object stores have no rename. So each folder that is written is a generation of its own, and `current`, which is written
last, makes it the one that is seen: a folder without it is not there, and nobody ever finds files of two. The
generation before it is deleted afterwards. A single object appears when it is complete.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.store.files import LEFTOVER_SECONDS
from twinkle.server.store.retry import FilesAway, is_transient
from twinkle.server.store.scratch import Scratch

T = TypeVar("T")

log = logging.getLogger("twinkle.server")

CURRENT = "current"
_GENERATION = re.compile(r"[0-9a-f]{32}")

# By protocol, for its file system. s3fs tries a request five times itself: with as many tries of boto, one that is not
# answered would hold its thread for minutes.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 2}}}
}


class SharedFiles:
    """`Files` on an fsspec file system, through a local directory."""

    def __init__(self, system: Any, root: str, scratch: Scratch) -> None:
        """
        Args:
            system: an fsspec file system that caches no listings: other machines change it too.
            root: a path on it.
        """
        self._system = system
        self._root = root.rstrip("/")
        self._scratch = scratch
        self._is_away = False

    def below(self, place: str) -> SharedFiles:
        return SharedFiles(self._system, self._path(place), self._scratch)

    # ------------------------------------------------------------ folders

    @contextmanager
    def new_folder(self, place: str) -> Generator[Path]:
        with self._scratch.directory() as directory:
            yield directory
            self._publish(directory, place)

    def _publish(self, directory: Path, place: str) -> None:
        generation = uuid.uuid4().hex
        with self._writing():
            try:
                for path in sorted(directory.iterdir()):
                    self._system.put_file(str(path), self._path(place, generation, path.name))
            except BaseException:
                with contextlib.suppress(Exception):
                    self._system.rm(self._path(place, generation), recursive=True)
                raise
            # If this fails it may have been done all the same: the generation must stay until another one counts.
            self._system.pipe_file(self._path(place, CURRENT), generation.encode())
        try:
            for name in self.names(place):
                if _GENERATION.fullmatch(name) and name != generation:
                    self.delete(f"{place}/{name}")
        except FilesAway:
            log.warning("what was overwritten is still in the storage, and deleted with the next write")

    @contextmanager
    def folder(self, place: str) -> Generator[Path]:
        with self._scratch.directory() as directory:
            yield self._in_generation(place, partial(self._fetch, place, directory))

    def _fetch(self, place: str, directory: Path, generation: str) -> Path:
        target = directory / generation
        target.mkdir()
        for name in self._sizes(place, generation):
            self._system.get_file(self._path(place, generation, name), str(target / name))
        return target

    def has_folder(self, place: str) -> bool:
        try:
            with self._reading():
                self._generation(place)
        except FileNotFoundError:
            return False
        return True

    def look(self, place: str, name: str) -> tuple[bytes, dict[str, int]]:
        def look(generation: str) -> tuple[bytes, dict[str, int]]:
            content = self._system.cat_file(self._path(place, generation, name), start=0)
            return content, self._sizes(place, generation)

        return self._in_generation(place, look)

    def read(self, place: str, name: str, offset: int = 0, size: int | None = None) -> bytes:
        end = None if size is None else offset + size

        def read(generation: str) -> bytes:
            return self._system.cat_file(self._path(place, generation, name), start=offset, end=end)

        return self._in_generation(place, read)

    def url(self, place: str, name: str) -> str:
        return self._in_generation(
            place, lambda generation: self._system.unstrip_protocol(self._path(place, generation, name))
        )

    def delete_folder(self, place: str) -> None:
        # Only the one that counts: another process may be writing the next.
        with contextlib.suppress(FileNotFoundError), self._reading():
            generation = self._generation(place)
            self._system.rm_file(self._path(place, CURRENT))
            self._system.rm(self._path(place, generation), recursive=True)

    def delete_leftovers(self) -> None:
        generations: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
        current: set[str] = set()
        with self._reading():
            for path in self._system.find(self._root):
                parent, _, name = str(path).removeprefix(f"{self._root}/").rpartition("/")
                place, _, generation = parent.rpartition("/")
                if name == CURRENT:
                    current.add(parent)
                elif _GENERATION.fullmatch(generation):
                    generations[place].setdefault(generation, []).append(path)
            for place, found in generations.items():
                if place in current and len(found) == 1:
                    continue
                with contextlib.suppress(FileNotFoundError):  # it is written or deleted just now
                    self._delete_unfinished(found, self._generation(place) if place in current else None)

    def _delete_unfinished(self, found: dict[str, list[str]], counts: str | None) -> None:
        for generation, paths in found.items():
            newest = max(self._system.modified(path).timestamp() for path in paths)
            if generation != counts and time.time() - newest > LEFTOVER_SECONDS:
                self._system.rm(paths)

    # ------------------------------------------------------------ generations

    def _in_generation(self, place: str, work: Callable[[str], T]) -> T:
        """The result of `work` on the folder's generation; on the next one, if that takes its place meanwhile."""
        with self._reading():
            generation = self._generation(place)
            while True:
                try:
                    return work(generation)
                except FileNotFoundError:
                    newer = self._generation(place)
                    if newer == generation:
                        raise
                    generation = newer

    def _generation(self, place: str) -> str:
        """
        Raises:
            FileNotFoundError: if there is no such folder.
        """
        # With `start`, s3fs doesn't ask for the size first.
        generation = self._system.cat_file(self._path(place, CURRENT), start=0).decode(
            "ascii", errors="replace"
        )
        if not _GENERATION.fullmatch(generation):
            raise FileNotFoundError(f"{CURRENT} names no generation")
        return generation

    def _sizes(self, place: str, generation: str) -> dict[str, int]:
        entries = self._system.ls(self._path(place, generation), detail=True)
        names = {_name(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}
        return {name: size for name, size in sorted(names.items()) if not name.startswith(".")}

    # ------------------------------------------------------------ files

    @contextmanager
    def new_file(self, place: str) -> Generator[Path]:
        with self._scratch.directory() as directory:
            path = directory / _name(place)
            yield path
            with self._writing():
                self._system.put_file(str(path), self._path(place))

    @contextmanager
    def file(self, place: str) -> Generator[Path]:
        with self._scratch.directory() as directory:
            path = directory / _name(place)
            with self._reading():
                self._system.get_file(self._path(place), str(path))
            yield path

    def delete_file(self, place: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._reading():
            self._system.rm_file(self._path(place))

    def names(self, place: str) -> list[str]:
        try:
            with self._reading():
                entries = self._system.ls(self._path(place), detail=False)
        except FileNotFoundError:
            return []
        return [name for entry in entries if (name := _name(entry.rstrip("/")))]

    def delete(self, place: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._reading():
            self._system.rm(self._path(place), recursive=True)

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *filter(None, parts)))

    # ------------------------------------------------------------ whether it can be reached

    @contextmanager
    def _reading(self) -> Generator[None]:
        """Work on the file system.

        Raises:
            FileNotFoundError: passed on.
            FilesAway: for whatever else it says.
        """
        try:
            yield
        except (FileNotFoundError, FilesAway):
            raise
        except Exception as error:
            raise self._away(error) from error
        if self._is_away:
            self._is_away = False
            log.warning("%s can be reached again: the server goes on with it", self._root)

    @contextmanager
    def _writing(self) -> Generator[None]:
        """The same; nothing can be missing but the place for all."""
        try:
            with self._reading():
                yield
        except FileNotFoundError as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> Exception:
        if is_transient(error):  # this machine's own disk
            return error
        if not self._is_away:
            self._is_away = True
            log.error(
                "storage.root: %s can't be reached (%s: %s); what needs it waits, or is answered 503",
                self._root,
                type(error).__name__,
                error,
            )
        return FilesAway(
            "the server's storage can't be reached just now: nothing was changed; try again later",
            retry_after=5.0,
        )


def _name(path: str) -> str:
    return path.rpartition("/")[2]


# ---------------------------------------------------------------- opening


def open_shared(url: str, scratch: Path) -> SharedFiles:
    """The files at a URL, through a local directory.

    Raises:
        InvalidRequest: if no package for such URLs is installed, or it is none.
    """
    system, root = _system(url)
    return SharedFiles(system, root, Scratch(scratch))


def check_shared(url: str) -> None:
    """Write, read and delete an object at a URL.

    Raises:
        InvalidRequest: says why that can't be done.
    """
    system, root = _system(url)
    path = f"{root.rstrip('/')}/.check-{uuid.uuid4().hex}"
    try:
        system.pipe_file(path, b"twinkle")
        is_there = system.cat_file(path) == b"twinkle"
        system.rm_file(path)
    except Exception as error:
        raise InvalidRequest(
            f"storage.root: {url} can't be written to ({type(error).__name__}: {error}); see that the bucket exists, "
            "that it can be reached from here, and that the credentials in the environment may read, write, list and "
            "delete in it"
        ) from error
    if not is_there:
        raise InvalidRequest(f"storage.root: what is written to {url} can't be read back")


def _system(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    package = f"'twinkle-server[{protocol}]'" if protocol == "s3" else f"the fsspec package for {protocol}://"
    try:
        fsspec: Any = import_module("fsspec")
        # What other machines write must be seen.
        return fsspec.url_to_fs(url, use_listings_cache=False, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        raise InvalidRequest(
            f"storage.root: {url} needs a package that is not installed ({error}): pip install {package}"
        ) from error
    except Exception as error:
        raise InvalidRequest(f"storage.root: {url} can't be used ({error})") from error
