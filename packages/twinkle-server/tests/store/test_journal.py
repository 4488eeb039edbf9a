"""What is appended is read again, whatever happened to the process or the disk meanwhile."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.protocol.errors import ServerFault, Unavailable
from twinkle.server.store import journal as journals
from twinkle.server.store.journal import Journal

# Bytes before the first record of a segment, and before each payload.
HEADER, FRAME = 28, 16


def read(directory: Path) -> list[bytes]:
    journal = Journal(directory)
    found = [payload for segment in journal.earlier for payload in journal.read(segment)]
    journal.close()
    return found


def written(directory: Path, *payloads: bytes, segment_bytes: int = 2**20) -> Journal:
    journal = Journal(directory, segment_bytes=segment_bytes)
    for payload in payloads:
        journal.append(payload)
    return journal


def test_records_are_read_in_their_order_over_segments_and_processes(tmp_path: Path):
    payloads = [bytes([i]) * 100 for i in range(20)]
    first = written(tmp_path, *payloads[:12], segment_bytes=540)
    assert len(first.sealed()) == 2 and first.segment == 3
    first.close()
    written(tmp_path, *payloads[12:]).close()
    assert read(tmp_path) == payloads


@settings(max_examples=60, deadline=None)
@given(
    payloads=st.lists(st.binary(max_size=40), min_size=1, max_size=6),
    cut=st.integers(0, 400),
    flip=st.none() | st.integers(0, 2**31),
)
def test_a_torn_or_damaged_end_hides_nothing_before_it(tmp_path_factory, payloads, cut, flip):
    directory = tmp_path_factory.mktemp("journal")
    written(directory, *payloads).close()
    [path] = directory.glob("*.log")
    data = bytearray(path.read_bytes())
    ends = [HEADER]
    for payload in payloads:
        ends.append(ends[-1] + FRAME + len(payload))
    assert ends[-1] == len(data)
    damaged_at = min(cut, len(data))
    if flip is None:
        del data[damaged_at:]
    elif damaged_at < len(data):
        data[damaged_at] ^= 1 + flip % 255
    path.write_bytes(data)
    whole = sum(end <= damaged_at for end in ends[1:])
    found = read(directory)
    assert found[:whole] == payloads[:whole]
    if flip is None:
        assert found == payloads[:whole]
    else:
        hit = next((i for i, end in enumerate(ends) if damaged_at < end), None)  # 0 is the header
        assert found == [payload for i, payload in enumerate(payloads, 1) if i != hit]


def is_subsequence(found: list[bytes], of: list[bytes]) -> bool:
    rest = iter(of)
    return all(payload in rest for payload in found)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=14),
    kind=st.sampled_from(["flip", "zeros", "cut"]),
    processes=st.integers(1, 3),
)
def test_damage_hides_no_record_but_those_that_it_hit_and_is_told_of(
    tmp_path_factory, data, sizes, kind, processes
):
    directory = tmp_path_factory.mktemp("journal")
    payloads = [bytes([i]) * size for i, size in enumerate(sizes)]
    for process in range(processes):
        written(directory, *payloads[process::processes], segment_bytes=220).close()
    in_order = [payload for process in range(processes) for payload in payloads[process::processes]]
    assert read(directory) == in_order
    paths = sorted(directory.glob("*.log"))
    path = data.draw(st.sampled_from(paths))
    content = bytearray(path.read_bytes())
    at, size = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 60))
    hit = range(at, min(at + size, len(content)))
    if kind == "cut":
        hit = range(at, len(content))
        del content[at:]
    for i in hit if kind != "cut" else ():
        content[i] = 0 if kind == "zeros" else content[i] ^ 0x5A
    changed = bytes(content) != path.read_bytes()
    survivors, lost = [], []
    for name in paths:
        end = HEADER
        for payload in payloads_of(name):
            start, end = end, end + FRAME + len(payload)
            is_hit = changed and name == path and hit.start < end and start < hit.stop
            (lost if is_hit else survivors).append(payload)
    last_size = sum(len(payload) for payload in payloads_of(path)[-1:])
    path.write_bytes(content)
    journal = Journal(directory)
    found = {number: journal.examine(number) for number in journal.earlier}
    journal.close()
    read_again = [payload for segment in found.values() for payload in segment.payloads]
    assert is_subsequence(read_again, in_order)
    if len(paths) > 1 or hit.start >= HEADER:  # else the lock's file has what the header had
        assert [payload for payload in read_again if payload in survivors] == survivors
    # A last record that is damaged can't be told from one whose write was cut off.
    is_at_the_end = path == paths[-1] and (kind == "cut" or hit.stop > len(content) - FRAME - last_size)
    if len(read_again) < len(in_order) and not is_at_the_end:
        assert any(segment.is_damaged for segment in found.values())


def payloads_of(path: Path) -> list[bytes]:
    """Of an undamaged segment, by the lengths in it."""
    content, at, found = path.read_bytes(), HEADER, []
    while at < len(content):
        length = int.from_bytes(content[at + 8 : at + 12], "little")
        found.append(content[at + FRAME : at + FRAME + length])
        at += FRAME + length
    return found


def test_a_length_that_became_huge_hides_its_own_record_alone(tmp_path: Path):
    written(tmp_path, b"one", b"two", b"three").close()
    [path] = tmp_path.glob("*.log")
    content = bytearray(path.read_bytes())
    content[HEADER + FRAME + 3 + 8 + 3] = 0x7F
    path.write_bytes(content)
    journal = Journal(tmp_path)
    found = journal.examine(1)
    assert found.payloads == [b"one", b"three"] and found.is_damaged
    journal.close()


def test_a_record_that_looks_like_records_is_none_but_itself(tmp_path: Path):
    forged = b"of another tenant"
    forgeries = [
        struct.pack("<8sII", bytes(8), len(forged), zlib.crc32(forged)) + forged,
        struct.pack("<II", len(forged), zlib.crc32(forged)) + forged,
    ]
    written(tmp_path, b"one", *forgeries, b"three").close()
    [path] = tmp_path.glob("*.log")
    content = bytearray(path.read_bytes())
    content[HEADER + FRAME + 3 + 8] ^= 0xFF  # the length of the first of them
    path.write_bytes(content)
    assert read(tmp_path) == [b"one", forgeries[1], b"three"]


def test_a_write_that_was_cut_off_is_no_damage_however_many_processes_follow(tmp_path: Path):
    written(tmp_path, b"one", b"two").close()
    path = tmp_path / "00000001.log"
    path.write_bytes(path.read_bytes()[:-1])
    written(tmp_path, b"three").close()
    written(tmp_path, b"four").close()
    journal = Journal(tmp_path)
    assert not any(journal.examine(number).is_damaged for number in journal.earlier)
    (tmp_path / "00000002.log").unlink()
    assert journal.examine(1).is_damaged
    journal.close()
    path.write_bytes(b"")
    assert read(tmp_path) == [b"four"]


def test_what_an_earlier_version_wrote_is_read(tmp_path: Path):
    payloads = [b"one", b"two", b""]
    (tmp_path / "00000007.log").write_bytes(
        b"".join(struct.pack("<II", len(p), zlib.crc32(p)) + p for p in payloads) + b"\x05\0\0"
    )
    written(tmp_path, b"three").close()
    assert read(tmp_path) == [*payloads, b"three"]
    journal = Journal(tmp_path)
    assert not any(journal.examine(number).is_damaged for number in journal.earlier)
    journal.close()


@pytest.mark.parametrize("what", ["segment", "directory", "parent"])
def test_a_journal_that_went_away_takes_nothing_more_until_it_is_back(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
):
    directory = tmp_path / "live" / "journal"
    journal = written(directory, b"one")
    gone = {"segment": directory / "00000001.log", "directory": directory, "parent": directory.parent}[what]
    gone.rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(Unavailable, match="journal is not where it was") as refused:
            journal.append(b"two")
        assert refused.value.status == 503 and refused.value.retry_after > 0
    if what == "segment":  # another file is not that one
        gone.write_bytes((tmp_path / "away").read_bytes())
        with pytest.raises(Unavailable):
            journal.append(b"two")
        gone.unlink()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    (tmp_path / "away").rename(gone)
    journal.append(b"three")
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    journal.close()
    assert read(directory) == [b"one", b"three"]


async def test_that_a_journal_went_away_is_told_though_nobody_asks_for_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    journal = written(tmp_path / "journal", b"one")
    (tmp_path / "journal").rename(tmp_path / "away")
    turns = [0]

    async def next_second(_seconds: float) -> None:
        turns[0] += 1
        if turns[0] > 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(journals.asyncio, "sleep", next_second)
    with pytest.raises(asyncio.CancelledError):
        await journal.run()
    assert "was moved, replaced or deleted" in caplog.text
    journal.close()


def test_what_follows_a_torn_end_goes_to_a_segment_of_its_own(tmp_path: Path):
    written(tmp_path, b"one", b"two").close()
    [path] = tmp_path.glob("*.log")
    path.write_bytes(path.read_bytes()[:-1])
    written(tmp_path, b"three").close()
    assert read(tmp_path) == [b"one", b"three"]


def test_a_full_disk_refuses_a_record_and_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = written(tmp_path, b"one")
    write, room = os.write, [5]

    def short(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "write", short)
        with pytest.raises(Unavailable, match="No space left on device.*no more requests") as refused:
            journal.append(b"two")
        assert refused.value.status == 503 and refused.value.retry_after > 0
    journal.append(b"three")
    journal.close()
    assert read(tmp_path) == [b"one", b"three"]


def test_a_segment_that_cannot_be_begun_refuses_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = written(tmp_path, b"x" * 50, segment_bytes=60)

    def full(*_: object) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(journals.os, "open", full)
        with pytest.raises(Unavailable, match="quota"):
            journal.append(b"y" * 50)
    journal.append(b"z" * 50)
    journal.close()
    assert read(tmp_path) == [b"x" * 50, b"z" * 50]


async def test_a_request_is_answered_when_it_is_on_the_disk_and_one_flush_serves_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: list[int] = []
    monkeypatch.setattr(journals.os, "fsync", flushed.append)
    always, second = Journal(tmp_path / "a", "always"), Journal(tmp_path / "b", "second")
    for journal in (always, second):
        journal.append(b"one")
        await journal.wait_durable()
    assert flushed == [always._descriptor]
    await always.wait_durable()
    assert len(flushed) == 1
    always.append(b"two")
    await asyncio.gather(*(always.wait_durable() for _ in range(20)))
    assert len(flushed) == 2


def test_a_deleted_segment_is_gone_and_numbers_go_on(tmp_path: Path):
    journal = written(tmp_path, b"a" * 50, b"b" * 50, segment_bytes=60)
    journal.delete(1)
    journal.close()
    written(tmp_path, b"c").close()
    assert read(tmp_path) == [b"b" * 50, b"c"]


def test_two_processes_never_have_it_at_once_and_a_killed_one_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = (
        "import sys, time; from pathlib import Path; from twinkle.server.store.journal import Journal;"
        "journal = Journal(Path(sys.argv[1])); journal.append(b'theirs'); print('has it', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "has it\n"
    monkeypatch.setattr(journals, "_LOCK_SECONDS", 0.2)
    with pytest.raises(ServerFault, match="another server has"):
        Journal(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait(10)
    began = time.monotonic()
    assert read(tmp_path) == [b"theirs"]
    assert time.monotonic() - began < 10


def test_a_segment_of_others_records_comes_between_ones_own(tmp_path: Path):
    journal = written(tmp_path, b"one", b"two")
    prepared = journal.prepare_segment([b"theirs", b"theirs too"])
    journal.append(b"three")  # meanwhile
    segment = journal.add_segment(prepared)
    assert journal.append(b"four") == segment + 1
    assert journal.sealed() == [1, 2]
    journal.close()
    assert read(tmp_path) == [b"one", b"two", b"three", b"theirs", b"theirs too", b"four"]
    again = Journal(tmp_path)
    assert not any(again.examine(number).is_damaged for number in again.earlier)
    again.close()


def test_a_segment_that_was_only_prepared_was_never_there(tmp_path: Path):
    journal = written(tmp_path, b"one")
    journal.prepare_segment([b"theirs"])
    journal.close()
    assert read(tmp_path) == [b"one"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_segment_can_be_added_to_an_empty_journal_and_without_room_is_not(tmp_path: Path, monkeypatch):
    journal = Journal(tmp_path)
    prepared = journal.prepare_segment([b"theirs"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(Unavailable, match="can't write to its disk"):
            journal.add_segment(prepared)
    journal.append(b"mine")
    assert journal.add_segment(prepared) == 2
    journal.close()
    assert read(tmp_path) == [b"mine", b"theirs"]
