"""An append-only log of records that outlives the process: segments of checksummed frames.

    DIRECTORY/NNNNNNNN.log    a segment (journal_segment.py)
    DIRECTORY/lock            held by the process that writes; has the segments' marker

When `append` returns, the operating system has the record, so it survives whatever process is killed; `flush` decides
when it is durable. A frame that was cut off by a crash or a full disk is ignored, and nothing is ever appended after
one. Knows nothing about the records' content.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from twinkle.protocol.errors import ServerFault, Unavailable, words_of
from twinkle.server.store.journal_segment import (
    HEADER_BYTES,
    MARKER_BYTES,
    frame_of,
    header_of,
    parse,
    read_header,
)

log = logging.getLogger("twinkle.server")

Flush: TypeAlias = Literal["always", "second", "never"]
"""When records become durable, and so survive a power cut: before a request is answered, within a second, or whenever
the operating system writes them."""

_SUFFIX = ".log"
_PARTIAL = ".partial"
_SEGMENT_BYTES = 32 * 2**20
_LOCK_SECONDS = 30.0


@dataclass(frozen=True)
class Found:
    """A segment's whole records.

    Attributes:
        is_damaged: records that had been written may be missing, and not only one whose write was cut off.
    """

    payloads: list[bytes]
    is_damaged: bool


class Journal:
    """Appends to the newest segment. Single-threaded, except for `read` and `flush_now`."""

    def __init__(self, directory: Path, flush: Flush = "second", segment_bytes: int = _SEGMENT_BYTES) -> None:
        """
        Raises:
            ServerFault: if another process has the directory, and doesn't end within half a minute.
            OSError: if it can't be written to.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._flush = flush
        self._segment_bytes = segment_bytes
        self._lock = _lock(directory / "lock")
        for path in directory.glob(f"*{_PARTIAL}"):  # left by a process that was killed
            path.unlink()
        self.earlier = self._numbers()
        """Segments of an earlier process, oldest first."""
        self._marker = self._known_marker()
        self._number = self.earlier[-1] if self.earlier else 0
        self._end = self._end_of(self._number) if self.earlier else 0  # number of its valid bytes
        self._descriptor = -1
        self._opened: tuple[int, int] | None = None  # device and inode of the descriptor's file
        self._opened_path = ""  # kept, since it is looked at for each record
        self._is_away = False
        self._unflushed = False
        self._flushing: asyncio.Task[None] | None = None

    @property
    def segment(self) -> int:
        """The number of the segment that has the last record."""
        return self._number

    def append(self, payload: bytes) -> int:
        """Write a record; returns its segment.

        Raises:
            Unavailable: if it can't be written; then none of it is there.
        """
        frame = frame_of(self._marker, payload)
        self.check_place()
        try:
            is_begun = self._end > HEADER_BYTES
            if self._descriptor < 0 or (is_begun and self._end + len(frame) > self._segment_bytes):
                self._begin_segment()
            self._write(frame)
        except OSError as error:
            raise _no_room(error) from error
        self._unflushed = True
        return self._number

    def prepare_segment(self, payloads: Sequence[bytes]) -> Path:
        """Write a file for `add_segment`. Blocking; may be called on any thread.

        Raises:
            Unavailable: if it can't be written.
        """
        path = self._directory / f"{os.urandom(8).hex()}{_PARTIAL}"
        _write_segment(path, [frame_of(self._marker, each) for each in payloads])
        return path

    def add_segment(self, prepared: Path) -> int:
        """Append all records of a prepared file as a segment; returns its number. They are durable then, or not there.

        Raises:
            Unavailable: if that fails.
        """
        self.check_place()
        try:
            with prepared.open("r+b") as file:
                file.write(header_of(self._marker, self._end))
                file.flush()
                os.fsync(file.fileno())
                end = file.seek(0, os.SEEK_END)
            self._close_segment()
            os.rename(prepared, self._path(self._number + 1))
        except OSError as error:
            raise _no_room(error) from error
        self._number += 1
        self._end = end
        return self._number

    def _write(self, frame: bytes) -> None:
        written = 0
        try:
            while written < len(frame):
                written += os.write(self._descriptor, memoryview(frame)[written:])
        except OSError:
            if written:
                self._cut_off()
            raise
        self._end += len(frame)

    def _cut_off(self) -> None:
        """Remove half a frame; if that fails, nothing may be appended after it."""
        try:
            os.ftruncate(self._descriptor, self._end)
            os.lseek(self._descriptor, self._end, os.SEEK_SET)
        except OSError:
            self._close_segment()

    def _begin_segment(self) -> None:
        path = self._path(self._number + 1)
        header = header_of(self._marker, self._end)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(descriptor, header) < len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._close_segment()
        self._descriptor, self._end = descriptor, len(header)
        found = os.fstat(descriptor)
        self._opened = found.st_dev, found.st_ino
        self._opened_path = str(path)
        self._number += 1

    def _close_segment(self) -> None:
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if self._flush != "never":
                os.fsync(descriptor)
        except OSError as error:  # the operating system has its content anyway
            log.error("a segment of the journal could not be flushed to the disk: %s", error)
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------ whether it is still there

    def check_place(self) -> None:
        """
        Raises:
            Unavailable: if the current segment is not at its path any more: what is written then is gone when the
                process ends.
        """
        if self._descriptor < 0:
            return
        try:
            found = os.stat(self._opened_path)
        except OSError:
            is_there = False
        else:
            is_there = (found.st_dev, found.st_ino) == self._opened
        if is_there and self._is_away:
            log.warning("the journal in %s is back: the server goes on with it", self._directory)
        if not is_there and not self._is_away:
            log.error(
                "the journal in %s was moved, replaced or deleted while the server runs on it: nothing more is "
                "accepted (503), lest it be lost. Put that very directory back (mv, not cp) and the server goes on. If "
                "it can't be had any more, start the server again: it begins without the runs of now, whose clients go "
                "on from their checkpoints.",
                self._directory,
            )
        self._is_away = not is_there
        if self._is_away:
            raise Unavailable(
                "the server's journal is not where it was, so it takes no more requests: nothing was changed; its "
                "operator finds the cause in its log; try again later",
                retry_after=5.0,
            )

    # ------------------------------------------------------------ on the disk itself

    async def wait_durable(self) -> None:
        """With `flush="always"`, wait until all appended records are durable.

        Raises:
            Unavailable: if they can't be flushed to the disk.
        """
        if self._flush != "always":
            return
        while self._unflushed or self._flushing is not None:
            if self._flushing is None:  # one flush serves all that are waiting by then
                self._unflushed = False
                self._flushing = asyncio.create_task(asyncio.to_thread(self.flush_now))
            flushing = self._flushing
            await asyncio.wait({flushing})
            if self._flushing is flushing:
                self._flushing = None
            if (error := flushing.exception()) is not None:
                self._unflushed = True
                raise Unavailable(
                    f"the server can't flush its journal to the disk ({words_of(error)}); try again"
                )
            if not self._unflushed:
                return

    async def run(self) -> None:
        """Flush every second, and check that the journal is still in its place, forever."""
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(Unavailable):  # it has been logged
                self.check_place()
            if self._flush != "never" and self._unflushed:
                self._unflushed = False
                try:
                    await asyncio.to_thread(self.flush_now)
                except OSError as error:
                    log.error("the journal could not be flushed to the disk: %s", error)

    def flush_now(self) -> None:
        descriptor = self._descriptor
        if descriptor < 0:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:  # otherwise it was closed meanwhile, and flushed before that
                raise

    def close(self) -> None:
        self._close_segment()
        os.close(self._lock)

    # ------------------------------------------------------------ segments

    def sealed(self) -> list[int]:
        """Segments that are complete, oldest first."""
        return [number for number in self._numbers() if number != self._number or self._descriptor < 0]

    def read(self, number: int) -> Iterator[bytes]:
        """A segment's whole records."""
        return iter(self.examine(number).payloads)

    def examine(self, number: int) -> Found:
        """What is left of a segment. Blocking."""
        path = self._path(number)
        data = path.read_bytes()
        end = self._end_by_next(number)
        counted = data if end is None else data[:end]
        segment = parse(counted, self._marker)
        missing = [f"{stop - start} bytes from {start}" for start, stop in segment.holes]
        if end is not None and len(data) < end:
            missing.append(f"{end - len(data)} bytes at the end, which are not there any more")
        if self._is_followed_by_a_gap(number):
            missing.append("the whole segment that came next")
        tail = segment.size - segment.end
        if tail and (number in self._numbers()[:-1] or not segment.is_cut_off):
            missing.append(f"{tail} bytes from {segment.end}")
        elif tail:
            log.warning("%s: %d bytes at the end are no whole record: a write was cut off", path, tail)
        if missing:
            log.error(
                "%s is damaged: %s are no records any more. What they said is lost, and runs that they were of "
                "can't go on; see to the disk",
                path,
                " and ".join(missing),
            )
        return Found(segment.payloads, bool(missing))

    def _is_followed_by_a_gap(self, number: int) -> bool:
        later = [other for other in self._numbers() if other > number]
        return bool(later) and later[0] != number + 1

    def _end_by_next(self, number: int) -> int | None:
        """The number of a segment's valid bytes, according to the next one."""
        found = self._header_of(number + 1)
        return None if found is None else found[1]

    def _header_of(self, number: int) -> tuple[bytes, int] | None:
        try:
            with self._path(number).open("rb") as file:
                return read_header(file.read(HEADER_BYTES))
        except FileNotFoundError:
            return None

    def _end_of(self, number: int) -> int:
        """The number of valid bytes in an earlier process's last segment: all but a write that was cut off."""
        segment = parse(self._path(number).read_bytes(), self._marker)
        return segment.end if segment.is_cut_off else segment.size

    def _known_marker(self) -> bytes:
        """The segments' marker, or else the lock file's, or else a new one, which is then in that file."""
        headers = [self._header_of(number) for number in self.earlier]
        markers = Counter(found[0] for found in headers if found is not None)
        kept = os.pread(self._lock, 64, 0)
        if markers:
            marker = markers.most_common(1)[0][0]
        elif re.fullmatch(rb"[0-9a-f]{16}", kept):
            marker = bytes.fromhex(kept.decode())
        else:
            marker = os.urandom(MARKER_BYTES)
        if kept != marker.hex().encode():
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, marker.hex().encode(), 0)
        return marker

    def delete(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob(f"*{_SUFFIX}"))

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}{_SUFFIX}"


def _write_segment(path: Path, frames: Sequence[bytes]) -> None:
    """Write frames after room for a header; all is durable, or there is no file.

    Raises:
        Unavailable: if that fails.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(HEADER_BYTES))
            file.writelines(frames)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise _no_room(error) from error


def _no_room(error: OSError) -> Unavailable:
    return Unavailable(
        f"the server can't write to its disk ({error.strerror or error}), so it takes no more requests: "
        "nothing was lost or changed; try again when there is room in its storage.root",
        retry_after=5.0,
    )


def _lock(path: Path) -> int:
    """Take the directory's lock, which ends with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(descriptor)
                raise ServerFault(
                    f"storage.root: another server has {path.parent} in use; end it, or choose another storage.root or "
                    "server.port"
                ) from None
            time.sleep(0.1)
