"""When copies of runs are taken, and what is left of them on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mortal_worker import MortalWorker

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.snapshots import SnapshotFiles, Snapshots

RUN = LiveRun("session:train:0", "alice", "session", "fake/model", AdapterSpec(rank=2))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def worker() -> MortalWorker:
    worker = MortalWorker()
    await worker.add_adapter(RUN.run_id, RUN.spec)
    return worker


def exports(worker: MortalWorker) -> int:
    return sum(method == "export_adapter" for method, _ in worker.calls)


async def test_a_run_is_copied_once_a_period_and_an_idle_one_no_more(worker: MortalWorker, tmp_path: Path):
    clock = Clock()
    snapshots = Snapshots(worker, SnapshotFiles(tmp_path / "s"), 30.0, clock)
    snapshots.begin(RUN)
    assert snapshots.seconds_until_due() is None
    for clock.now in (1.0, 2.0, 20.0):
        snapshots.stepped(RUN.run_id)
        await snapshots.take_due()
    assert exports(worker) == 0
    assert snapshots.seconds_until_due() == 11.0  # since the first step
    clock.now = 31.0
    await snapshots.take_due()
    assert exports(worker) == 1
    assert snapshots.progress(RUN.run_id).is_safe
    clock.now = 1000.0
    await snapshots.take_due()
    assert exports(worker) == 1
    assert snapshots.seconds_until_due() is None
    await snapshots.close()


async def test_the_newest_copy_alone_stays_on_disk_and_is_what_is_read(worker: MortalWorker, tmp_path: Path):
    files = SnapshotFiles(tmp_path / "s")
    snapshots = Snapshots(worker, files, 0.0, Clock())
    snapshots.begin(RUN)
    for _ in range(3):
        await worker.optim_step([AdamStep(RUN.run_id, AdamParams(learning_rate=0.1, weight_decay=0.5))])
        snapshots.stepped(RUN.run_id)
        await snapshots.take_due()
    in_memory = await snapshots.read(RUN.run_id)
    assert in_memory is not None and in_memory.optimizer is not None and in_memory.optimizer.step == 3
    while snapshots._writing:
        await next(iter(snapshots._writing))
    assert len(list((tmp_path / "s" / RUN.run_id / "weights").iterdir())) == 1
    on_disk = await snapshots.read(RUN.run_id)
    assert on_disk is not None and on_disk.optimizer is not None and on_disk.optimizer.step == 3
    for name, weights in in_memory.weights.items():
        np.testing.assert_array_equal(on_disk.weights[name], weights)
    snapshots.forget(RUN.run_id)
    while snapshots._writing:
        await next(iter(snapshots._writing))
    assert list((tmp_path / "s").iterdir()) == []


async def test_a_run_that_ends_while_its_copy_is_written_leaves_nothing(worker: MortalWorker, tmp_path: Path):
    snapshots = Snapshots(worker, SnapshotFiles(tmp_path / "s"), 0.0, Clock())
    snapshots.begin(RUN)
    snapshots.stepped(RUN.run_id)
    await snapshots.take_due()
    snapshots.forget(RUN.run_id)
    while snapshots._writing:
        await next(iter(snapshots._writing))
    assert list((tmp_path / "s").iterdir()) == []


def test_what_an_earlier_process_left_is_deleted_at_the_start(tmp_path: Path):
    left = tmp_path / "s" / "old-run" / "weights" / "0"
    left.mkdir(parents=True)
    (left / "manifest.json").write_text("{}")
    SnapshotFiles(tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


async def test_a_copy_that_cannot_be_written_is_kept_in_memory(
    worker: MortalWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = SnapshotFiles(tmp_path / "s")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "write", full)
    snapshots = Snapshots(worker, files, 0.0, Clock())
    snapshots.begin(RUN)
    snapshots.stepped(RUN.run_id)
    await snapshots.take_due()
    while snapshots._writing:
        await next(iter(snapshots._writing))
    assert await snapshots.read(RUN.run_id) is not None
    assert snapshots.progress(RUN.run_id).is_safe


async def test_a_worker_that_is_never_lost_is_never_copied(worker: MortalWorker):
    snapshots = Snapshots(worker, None, 0.0, Clock())
    snapshots.begin(RUN)
    snapshots.stepped(RUN.run_id)
    await snapshots.take_due()
    assert exports(worker) == 0


async def test_a_load_takes_the_place_of_a_gradient_too(worker: MortalWorker, tmp_path: Path):
    snapshots = Snapshots(worker, SnapshotFiles(tmp_path / "s"), 30.0, Clock())
    snapshots.begin(RUN)
    snapshots.accumulated(RUN.run_id)
    assert not snapshots.progress(RUN.run_id).is_safe
    snapshots.loaded(RUN.run_id, await worker.export_adapter(RUN.run_id, with_optimizer=True))
    assert snapshots.progress(RUN.run_id).is_safe
    await snapshots.close()


async def test_each_change_of_a_run_makes_another_version_and_a_copy_makes_none(
    worker: MortalWorker, tmp_path: Path
):
    snapshots = Snapshots(worker, SnapshotFiles(tmp_path / "s"), 0.0, Clock())
    snapshots.begin(RUN)
    state = await worker.export_adapter(RUN.run_id, with_optimizer=True)
    versions = [snapshots.version(RUN.run_id)]
    for change in (
        lambda: snapshots.accumulated(RUN.run_id),
        lambda: snapshots.stepped(RUN.run_id),
        lambda: snapshots.loaded(RUN.run_id, state),
        lambda: snapshots.restored(RUN.run_id),
    ):
        change()
        versions.append(snapshots.version(RUN.run_id))
    assert len(set(versions)) == 5
    snapshots.stepped(RUN.run_id)
    before = snapshots.version(RUN.run_id)
    await snapshots.take_due()
    await snapshots.copied(RUN.run_id, state)
    assert snapshots.version(RUN.run_id) == before
    await snapshots.close()
