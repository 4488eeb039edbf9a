"""How records lie in a segment of the journal, and how they are found again though bytes of it have changed.

    header    magic, marker, bytes of the segment before that count, CRC-32 of these
    frames    marker, length of the payload, CRC-32 of length and payload, payload

The marker is drawn at random for a journal, so nobody who sends a payload can put a frame into it. Behind a damaged
frame the next one is found by it. What a write that was cut off left at the end of a segment is told from damage by
the next header, which says where that segment ended. Reads what versions without headers wrote, as far as it is whole.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass

_MAGIC = b"TWKLJRN2"
_HEADER = struct.Struct("<8s8sQI")
_FRAME = struct.Struct("<8sII")
_OLD_FRAME = struct.Struct("<II")
HEADER_BYTES = _HEADER.size
MARKER_BYTES = 8


@dataclass(frozen=True)
class Segment:
    """What was read of a segment.

    Attributes:
        payloads: of all whole frames, in order.
        holes: (first byte, behind the last) of what is no whole frame, where more follows.
        end: behind the last whole frame.
        size: in bytes.
        is_cut_off: what comes behind `end` is the beginning of a frame, as a write leaves it that was cut off.
    """

    payloads: list[bytes]
    holes: list[tuple[int, int]]
    end: int
    size: int
    is_cut_off: bool


def new_marker() -> bytes:
    return os.urandom(MARKER_BYTES)


def header(marker: bytes, previous_end: int) -> bytes:
    """
    Args:
        previous_end: so many bytes of the segment before count.
    """
    fields = struct.pack("<8s8sQ", _MAGIC, marker, previous_end)
    return fields + struct.pack("<I", zlib.crc32(fields))


def read_header(data: bytes) -> tuple[bytes, int] | None:
    """The marker and the end of the segment before; None if there is no whole header."""
    if len(data) < HEADER_BYTES:
        return None
    magic, marker, previous_end, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC or zlib.crc32(data[: HEADER_BYTES - 4]) != checksum:
        return None
    return marker, previous_end


def frame(marker: bytes, payload: bytes) -> bytes:
    return _FRAME.pack(marker, len(payload), _checksum(payload)) + payload


def _checksum(payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<I", len(payload))))


def parse(data: bytes, marker: bytes | None) -> Segment:
    """
    Args:
        data: the bytes of it that count.
        marker: of the journal's other segments, for one whose own header is damaged.
    """
    found = read_header(data)
    if found is not None:
        return _parse(data, found[0], HEADER_BYTES)
    if marker is not None and (marker in data or not data[:HEADER_BYTES].strip(b"\0")):
        return _parse(data, marker, 0)
    return _parse_old(data)


def _parse(data: bytes, marker: bytes, start: int) -> Segment:
    payloads: list[bytes] = []
    holes: list[tuple[int, int]] = []
    whole_until, at = start, start
    while (at := data.find(marker, at)) >= 0:
        behind = _end_of_frame(data, at)
        if behind is None:
            at += 1
            continue
        if at > whole_until:
            holes.append((whole_until, at))
        payloads.append(data[at + _FRAME.size : behind])
        whole_until = at = behind
    tail = data[whole_until : whole_until + _FRAME.size]
    begins = tail[:MARKER_BYTES] == marker[: len(tail)]
    if begins and len(tail) == _FRAME.size:
        begins = whole_until + _FRAME.size + _FRAME.unpack(tail)[1] > len(data)
    return Segment(payloads, holes, whole_until, len(data), is_cut_off=bool(tail) and begins)


def _end_of_frame(data: bytes, start: int) -> int | None:
    """Behind the frame that begins there; None if it is not whole."""
    if start + _FRAME.size > len(data):
        return None
    _, length, checksum = _FRAME.unpack_from(data, start)
    end = start + _FRAME.size + length
    if end > len(data) or _checksum(memoryview(data)[start + _FRAME.size : end]) != checksum:
        return None
    return end


def _parse_old(data: bytes) -> Segment:
    """Frames without marker: nothing is found behind one that is not whole."""
    payloads: list[bytes] = []
    start, is_cut_off = 0, False
    while start < len(data):
        is_cut_off = start + _OLD_FRAME.size > len(data)
        if is_cut_off:
            break
        length, checksum = _OLD_FRAME.unpack_from(data, start)
        end = start + _OLD_FRAME.size + length
        payload = data[start + _OLD_FRAME.size : end]
        is_cut_off = end > len(data)
        if is_cut_off or zlib.crc32(payload) != checksum:
            break
        payloads.append(payload)
        start = end
    # With no record at all it is none of that version's, but one of ours of which nothing is left.
    is_cut_off = is_cut_off and (bool(payloads) or len(data) < HEADER_BYTES)
    return Segment(payloads, [], start, len(data), is_cut_off)
