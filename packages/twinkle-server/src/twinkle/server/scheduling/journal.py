"""An append-only log of records that outlives the process: segments of checksummed frames.

    DIRECTORY/NNNNNNNN.log    frames, one behind the other: length and CRC-32 of the payload (4 bytes each,
                              little-endian), payload

A record is with the operating system when `append` returns, so it survives whatever process is killed; when it is on
the disk itself is the business of `flush`. A frame that was cut off by a crash or a full disk ends its segment for the
reader, and nothing is ever appended behind one. Knows nothing of what the records say.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from twinkle.protocol.errors import ServerFault, Unavailable, words_of

log = logging.getLogger("twinkle.server")

Flush: TypeAlias = Literal["always", "second", "never"]
"""When records are on the disk itself, and so survive a power cut: before a request is answered, within a second, or
when the operating system sees fit."""

_FRAME = struct.Struct("<II")
_SUFFIX = ".log"
_SEGMENT_BYTES = 32 * 2**20
_LOCK_SECONDS = 30.0


class Journal:
    """Appends to the newest segment. Single-threaded, but for `read` and `flush_now`."""

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
        self.earlier = self._numbers()
        """Segments of an earlier process, oldest first."""
        self._number = self.earlier[-1] if self.earlier else 0
        self._descriptor = -1
        self._size = 0
        self._unflushed = False
        self._flushing: asyncio.Task[None] | None = None

    @property
    def segment(self) -> int:
        """The number of the segment that the last record went to."""
        return self._number

    def append(self, payload: bytes) -> int:
        """Write a record; returns its segment.

        Raises:
            Unavailable: if it can't be written; then nothing of it is there.
        """
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            if self._descriptor < 0 or (self._size and self._size + len(frame) > self._segment_bytes):
                self._begin_segment()
            self._write(frame)
        except OSError as error:
            raise Unavailable(
                f"the server can't write to its disk ({error.strerror or error}), so it takes no more requests: "
                "nothing was lost or changed; try again when there is room in its storage.root",
                retry_after=5.0,
            ) from error
        self._unflushed = True
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
        self._size += len(frame)

    def _cut_off(self) -> None:
        """Take back half a frame; where that can't be done, no other may follow it."""
        try:
            os.ftruncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
        except OSError:
            self._close_segment()

    def _begin_segment(self) -> None:
        path = self._path(self._number + 1)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._close_segment()
        self._descriptor, self._size = descriptor, 0
        self._number += 1

    def _close_segment(self) -> None:
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if self._flush != "never":
                os.fsync(descriptor)
        except OSError as error:  # what is in it is with the operating system all the same
            log.error("a segment of the journal could not be flushed to the disk: %s", error)
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------ on the disk itself

    async def answered(self) -> None:
        """Wait until a request may be answered whose record has been appended.

        Raises:
            Unavailable: if it can't be brought onto the disk.
        """
        if self._flush != "always":
            return
        while self._unflushed or self._flushing is not None:
            if self._flushing is None:  # one flush serves all who have come meanwhile
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
        """Flush every second, for ever."""
        while True:
            await asyncio.sleep(1.0)
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
            if error.errno != errno.EBADF:  # else it was closed meanwhile, and flushed before that
                raise

    def close(self) -> None:
        self._close_segment()
        os.close(self._lock)

    # ------------------------------------------------------------ segments

    def sealed(self) -> list[int]:
        """Segments that nothing is appended to any more, oldest first."""
        return [number for number in self._numbers() if number != self._number or self._descriptor < 0]

    def read(self, number: int) -> Iterator[bytes]:
        """The records of a segment, up to the first that is not whole."""
        data = self._path(number).read_bytes()
        start = 0
        while start + _FRAME.size <= len(data):
            length, checksum = _FRAME.unpack_from(data, start)
            end = start + _FRAME.size + length
            payload = data[start + _FRAME.size : end]
            if len(payload) < length or zlib.crc32(payload) != checksum:
                break
            yield payload
            start = end
        if start < len(data):
            log.warning(
                "%s: %d bytes at the end are no whole record: a write was cut off",
                self._path(number),
                len(data) - start,
            )

    def delete(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob(f"*{_SUFFIX}"))

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}{_SUFFIX}"


def _lock(path: Path) -> int:
    """Have the directory for oneself; the lock ends with the process, however that ends."""
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
