"""What is appended is read again, whatever happened to the process or the disk meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.protocol.errors import ServerFault, Unavailable
from twinkle.server.scheduling import journal as journals
from twinkle.server.scheduling.journal import Journal


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
    first = written(tmp_path, *payloads[:12], segment_bytes=450)
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
    ends = [0]
    for payload in payloads:
        ends.append(ends[-1] + 8 + len(payload))
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
        await journal.answered()
    assert flushed == [always._descriptor]
    await always.answered()
    assert len(flushed) == 1
    always.append(b"two")
    import asyncio

    await asyncio.gather(*(always.answered() for _ in range(20)))
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
        "import sys, time; from pathlib import Path; from twinkle.server.scheduling.journal import Journal;"
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
