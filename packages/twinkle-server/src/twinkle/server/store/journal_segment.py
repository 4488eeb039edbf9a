"""The bytes of a journal's segments: a header, then checksummed frames.

    header                magic, marker, number of valid bytes in the segment before, CRC-32 of these
    frame                 marker, length of the payload, CRC-32 of length and payload, payload

The marker is random for each journal, so nobody can smuggle a frame into a payload. After a damaged frame it leads to
the next one. The next segment's header says where a segment ended, which tells the rest of a write that was cut off
from damage. Segments of versions without headers are read as far as they are whole.
"""

from __future__ import annotations

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
    """What was read from a segment.

    Attributes:
        payloads: of all whole frames, in order.
        holes: (first byte, one past the last) of what is not a whole frame, if more follows.
        end: one past the last whole frame.
        size: in bytes.
        is_cut_off: what follows `end` is the beginning of a frame, as left by a write that was cut off.
    """

    payloads: list[bytes]
    holes: list[tuple[int, int]]
    end: int
    size: int
    is_cut_off: bool


def header_of(marker: bytes, previous_end: int) -> bytes:
    """
    Args:
        previous_end: number of valid bytes in the segment before.
    """
    fields = struct.pack("<8s8sQ", _MAGIC, marker, previous_end)
    return fields + struct.pack("<I", zlib.crc32(fields))


def read_header(data: bytes) -> tuple[bytes, int] | None:
    """The marker, and the end of the segment before; None if there is no whole header."""
    if len(data) < HEADER_BYTES:
        return None
    magic, marker, previous_end, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC or zlib.crc32(data[: HEADER_BYTES - 4]) != checksum:
        return None
    return marker, previous_end


def frame_of(marker: bytes, payload: bytes) -> bytes:
    return _FRAME.pack(marker, len(payload), _checksum(payload)) + payload


def _checksum(payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<I", len(payload))))


def parse(data: bytes, marker: bytes | None) -> Segment:
    """
    Args:
        data: the segment's valid bytes.
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
    """One past the frame that begins there; None if it is not whole."""
    if start + _FRAME.size > len(data):
        return None
    _, length, checksum = _FRAME.unpack_from(data, start)
    end = start + _FRAME.size + length
    if end > len(data) or _checksum(memoryview(data)[start + _FRAME.size : end]) != checksum:
        return None
    return end


def _parse_old(data: bytes) -> Segment:
    """Parse frames without markers: after one that is not whole, nothing is found."""
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
    # Without any record it is not of that version, but one of ours with nothing left.
    is_cut_off = is_cut_off and (bool(payloads) or len(data) < HEADER_BYTES)
    return Segment(payloads, [], start, len(data), is_cut_off)
