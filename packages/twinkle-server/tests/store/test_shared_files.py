"""An object store of its own: what is left by those that were killed, and what happens while it can't be reached."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_s3 import RunningS3

from twinkle.protocol.errors import InvalidRequest, Unavailable
from twinkle.server.config import parse_config
from twinkle.server.serve.launch import checks
from twinkle.server.store import retry, shared_files
from twinkle.server.store.retry import FilesAway
from twinkle.server.store.scratch import Scratch
from twinkle.server.store.shared_files import SharedFiles, check_shared, open_shared

PLACE = "run/weights/name"


@pytest.fixture
def root(s3: RunningS3) -> str:
    return s3.new_root()


def put(files: SharedFiles, content: bytes, place: str = PLACE) -> None:
    with files.new_folder(place) as directory:
        (directory / "file").write_bytes(content)


def keys(s3: RunningS3, root: str) -> list[str]:
    bucket = root.removeprefix("s3://").partition("/")[0]
    return [entry["Key"] for entry in s3.client().list_objects_v2(Bucket=bucket).get("Contents", [])]


class Dying:
    """A file system whose process is killed at its n-th write."""

    def __init__(self, system, writes: int) -> None:
        self.system = system
        self.left = writes

    def __getattr__(self, name: str):
        if name in ("put_file", "pipe_file", "rm"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return getattr(self.system, name)


@pytest.mark.parametrize("writes", range(5))
def test_a_writer_that_is_killed_leaves_the_old_or_the_new(
    s3: RunningS3, root: str, tmp_path: Path, writes: int
):
    files = open_shared(root, tmp_path)
    put(files, b"old")
    dying = SharedFiles(Dying(files._system, writes), files._root, Scratch(tmp_path))
    # file, current, deleting the old one; the attempt to tidy up fails with the rest
    if writes < 3:
        with pytest.raises(KeyboardInterrupt):
            put(dying, b"new")
    else:
        put(dying, b"new")
    with files.folder(PLACE) as directory:
        content = (directory / "file").read_bytes()
    assert content == (b"old" if writes < 2 else b"new")
    put(files, b"newest")
    assert len(keys(s3, root)) == 2, "the next write deletes what was left"


def test_what_killed_writers_left_is_deleted_when_it_is_old(
    s3: RunningS3, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = open_shared(root, tmp_path)
    for place in (PLACE, "run/weights/other"):
        put(files, b"kept", place)
    before = keys(s3, root)
    for place in (PLACE, "run/weights/never-finished"):
        dying = SharedFiles(Dying(files._system, 1), files._root, Scratch(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            put(dying, b"half", place)
    assert len(keys(s3, root)) == len(before) + 2
    files.delete_leftovers()
    assert len(keys(s3, root)) == len(before) + 2, "somebody may be writing it"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * shared_files.LEFTOVER_SECONDS)
    files.delete_leftovers()
    assert keys(s3, root) == before


def test_deleting_leaves_what_another_server_is_writing(s3: RunningS3, root: str, tmp_path: Path):
    ours, theirs = open_shared(root, tmp_path / "a"), open_shared(root, tmp_path / "b")
    put(ours, b"old")
    with theirs.new_folder(PLACE) as directory:
        (directory / "file").write_bytes(b"new")
        ours.delete_folder(PLACE)
        assert keys(s3, root) == []
    with ours.folder(PLACE) as directory:
        assert (directory / "file").read_bytes() == b"new"


def test_a_large_file_arrives_whole(root: str, tmp_path: Path):
    """It is uploaded in parts."""
    files = open_shared(root, tmp_path)
    content = os.urandom(2**20) * 120
    put(files, content)
    assert files.read(PLACE, "file", 110 * 2**20, 10) == content[:10]
    with files.folder(PLACE) as directory:
        assert (directory / "file").read_bytes() == content


@pytest.fixture
def away(s3: RunningS3) -> Iterator[RunningS3]:
    yield s3
    s3.start_if_stopped()


def test_a_store_that_is_away_is_said_to_be_and_comes_back(
    away: RunningS3, root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    files = open_shared(root, tmp_path)
    put(files, b"old")
    away.stop()
    for work in (
        lambda: put(files, b"new"),
        lambda: files.read(PLACE, "file"),
        lambda: files.names(""),
        lambda: files.delete_folder(PLACE),
    ):
        with pytest.raises(FilesAway, match="can't be reached just now") as caught:
            work()
        assert retry.is_transient(caught.value) and caught.value.retry_after == 5.0
        assert "127.0.0.1" not in caught.value.message and "bucket" not in caught.value.message
    away.start()
    assert files.read(PLACE, "file") == b"old"
    assert [record.levelname for record in caplog.records if "reached" in record.message] == [
        "ERROR",
        "WARNING",
    ]


async def test_a_save_waits_for_the_store_and_the_event_loop_does_not(
    away: RunningS3, root: str, tmp_path: Path
):
    files = open_shared(root, tmp_path)
    away.stop()
    save = asyncio.create_task(retry.retry_while_unavailable(lambda: put(files, b"new")))
    for _ in range(20):
        await asyncio.sleep(0.05)  # the loop turns meanwhile
    assert not save.done()
    away.start()
    await save
    assert files.read(PLACE, "file") == b"new"


async def test_a_save_that_waits_too_long_fails_and_leaves_nothing(
    away: RunningS3, root: str, tmp_path: Path
):
    files = open_shared(root, tmp_path)
    away.stop()
    with pytest.raises(Unavailable) as caught:
        await retry.retry_while_unavailable(lambda: put(files, b"new"), give_up_seconds=0.5)
    assert caught.value.category == "server"
    away.start()
    assert keys(away, root) == [] and not files.has_folder(PLACE)


# ---------------------------------------------------------------- at the start


def test_a_root_that_can_be_written_to_passes_and_is_left_as_it_was(s3: RunningS3, root: str):
    check_shared(root)
    assert keys(s3, root) == []


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ("s3://no-such-bucket/prefix", "bucket"),
        ("nothing-of-the-kind://bucket", "storage.root: nothing-of-the-kind://bucket"),
        ("gs://bucket", "pip install"),
    ],
)
def test_a_root_that_cannot_be_used_is_told_at_launch(s3: RunningS3, root: str, said: str):
    config = parse_config({"model": {"model_id": "x"}, "server": {"port": 0}, "storage": {"root": root}})
    with pytest.raises(InvalidRequest, match="storage.root") as caught:
        for check in checks(config):
            check()
    assert said in caught.value.message


def test_credentials_that_are_wrong_are_told_at_launch(s3: RunningS3, root: str):
    with s3.asking_for_credentials(), pytest.raises(InvalidRequest, match="storage.root.*credentials"):
        check_shared(root)
    check_shared(root)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    import fsspec
    from fsspec.registry import _registry, known_implementations

    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(known_implementations, "s3", {"class": "no_such_package.S3", "err": "Install s3fs"})
    assert fsspec.__version__
    with pytest.raises(InvalidRequest, match=r"pip install 'twinkle-server\[s3\]'"):
        check_shared("s3://bucket/prefix")


@pytest.mark.parametrize(
    ("root", "said"),
    [("s3://", "names no bucket"), ("s3://user:key@bucket/prefix", "come from the environment")],
)
def test_a_root_that_is_no_url_is_refused_when_the_file_is_read(root: str, said: str):
    with pytest.raises(InvalidRequest, match=f"storage.root.*{said}"):
        parse_config({"model": {"model_id": "x"}, "storage": {"root": root}})


# ---------------------------------------------------------------- scratch


def test_scratch_directories_of_ended_processes_are_deleted_and_no_others(tmp_path: Path):
    left = tmp_path / "left" / "half"
    left.mkdir(parents=True)
    first = Scratch(tmp_path)
    assert not left.exists()
    with first.directory() as held:
        assert oct(held.stat().st_mode & 0o777) == oct(tmp_path.stat().st_mode & 0o777) == "0o700"
        others = [threading.Thread(target=Scratch, args=(tmp_path,)) for _ in range(4)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        assert held.is_dir()
    assert not held.exists()
