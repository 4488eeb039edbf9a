"""When copies of runs are taken, and what is left of them on disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from mortal_worker import MortalWorker

from twinkle.protocol import messages as m
from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.scheduling.jobs import Job
from twinkle.server.store.run_files import RunFiles

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


def make(worker: MortalWorker, directory: Path, seconds: float | None) -> Snapshots:
    snapshots = Snapshots(worker, RunFiles(directory / "s"), seconds, clock=Clock())
    snapshots.begin(RUN)
    return snapshots


def a_step(seq_id: int, tokens: int = 0) -> Job:
    request = m.OptimStepRequest(model_id=RUN.run_id, seq_id=seq_id)
    return Job(f"request-{seq_id}", "alice", RUN.run_id, seq_id, request, tokens)


def exports(worker: MortalWorker) -> int:
    return sum(method == "export_adapter" for method, _ in worker.calls)


def at(snapshots: Snapshots, now: float) -> None:
    assert isinstance(snapshots.clock, Clock)
    snapshots.clock.now = now


async def test_a_run_is_copied_once_a_period_and_an_idle_one_no_more(worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 30.0)
    assert snapshots.seconds_until_due() is None
    for seq_id, now in enumerate((1.0, 2.0, 20.0), start=1):
        at(snapshots, now)
        snapshots.changed([a_step(seq_id)], has_gradient=False)
        await snapshots.take_due()
    assert exports(worker) == 0
    assert snapshots.seconds_until_due() == 11.0  # since the first step
    at(snapshots, 31.0)
    await snapshots.take_due()
    assert exports(worker) == 1
    assert snapshots.changed_runs() == [] and snapshots.history.take_all() == []
    at(snapshots, 1000.0)
    await snapshots.take_due()
    assert exports(worker) == 1
    assert snapshots.seconds_until_due() is None
    await snapshots.close()


@pytest.mark.parametrize(("jobs", "tokens"), [(512, 0), (2, 2**19)])
async def test_much_that_would_have_to_be_computed_again_is_copied_at_once(
    worker: MortalWorker, tmp_path: Path, jobs: int, tokens: int
):
    snapshots = make(worker, tmp_path, 30.0)
    for seq_id in range(1, jobs):
        snapshots.changed([a_step(seq_id, tokens)], has_gradient=True)
    assert snapshots.seconds_until_due() == 30.0
    snapshots.changed([a_step(jobs, tokens)], has_gradient=True)
    assert snapshots.seconds_until_due() == 0.0


@pytest.mark.parametrize(("cost", "pause"), [(0.5, 0.5 / 0.02), (10.0, 60.0)])
async def test_copies_that_take_long_are_taken_seldom_within_bounds(
    worker: MortalWorker, tmp_path: Path, cost: float, pause: float
):
    snapshots = make(worker, tmp_path, 1.0)
    worker.note_after = lambda _method: at(snapshots, snapshots.clock() + cost)
    snapshots.changed([a_step(1)], has_gradient=False)
    at(snapshots, 1.0)
    await snapshots.take_due()
    snapshots.changed([a_step(2)], has_gradient=False)
    assert snapshots.seconds_until_due() == pause
    await snapshots.close()


async def test_the_newest_copy_alone_stays_on_disk_and_is_what_is_read(worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 0.0)
    for seq_id in range(1, 4):
        await worker.optim_step([AdamStep(RUN.run_id, AdamParams(learning_rate=0.1, weight_decay=0.5))])
        snapshots.changed([a_step(seq_id)], has_gradient=seq_id == 3)
        await snapshots.take_due()
    in_memory = await snapshots.read(RUN.run_id)
    assert in_memory is not None and in_memory.optimizer is not None and in_memory.optimizer.step == 3
    assert in_memory.gradients is not None
    assert await snapshots.written(RUN.run_id)
    assert [path.name for path in (tmp_path / "s" / RUN.run_id).iterdir()] == ["3.safetensors"]
    assert snapshots.stored(RUN.run_id) == 3
    on_disk = await snapshots.read(RUN.run_id)
    assert on_disk is not None and on_disk.optimizer is not None and on_disk.optimizer.step == 3
    for name, weights in in_memory.weights.items():
        np.testing.assert_array_equal(on_disk.weights[name], weights)
    snapshots.forget(RUN.run_id)
    await snapshots.close()
    assert list((tmp_path / "s").iterdir()) == []


async def test_a_copy_waits_for_what_the_run_still_writes(worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 0.0)
    settled = asyncio.Event()

    async def wait(run_id: str) -> None:
        assert run_id == RUN.run_id
        await settled.wait()

    snapshots.settled = wait
    snapshots.changed([a_step(1)], has_gradient=False)
    await snapshots.take_due()
    await asyncio.sleep(0.02)
    assert snapshots.stored(RUN.run_id) == 0 and not (tmp_path / "s").exists()
    settled.set()
    assert await snapshots.written(RUN.run_id)
    assert snapshots.stored(RUN.run_id) == 1


async def test_a_run_that_ends_while_its_copy_is_written_leaves_nothing(worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 0.0)
    snapshots.changed([a_step(1)], has_gradient=False)
    await snapshots.take_due()
    snapshots.forget(RUN.run_id)
    await snapshots.close()
    assert list(tmp_path.glob("s/*")) == []


async def test_a_copy_that_cannot_be_written_is_kept_in_memory_and_written_when_it_can_be(
    worker: MortalWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    snapshots = make(worker, tmp_path, 0.0)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots.files, "write", full)
        snapshots.changed([a_step(1)], has_gradient=False)
        await snapshots.take_due()
        assert not await snapshots.written(RUN.run_id)
    assert await snapshots.read(RUN.run_id) is not None
    assert snapshots.seconds_until_due() == 10.0
    at(snapshots, 10.0)
    await snapshots.take_due()
    await snapshots.close()
    assert exports(worker) == 1 and snapshots.stored(RUN.run_id) == 1


async def test_without_files_nothing_is_kept(worker: MortalWorker):
    snapshots = Snapshots(worker, None, 0.0)
    snapshots.begin(RUN)
    snapshots.changed([a_step(1)], has_gradient=False)
    await snapshots.take_due()
    assert exports(worker) == 0


async def test_where_nothing_can_be_lost_copies_are_taken_on_demand_alone(
    worker: MortalWorker, tmp_path: Path
):
    snapshots = make(worker, tmp_path, None)
    snapshots.changed([a_step(1)], has_gradient=False)
    snapshots.hurry(RUN.run_id)
    assert snapshots.seconds_until_due() is None
    assert snapshots.history.take_all() == []  # it would grow for ever
    await snapshots.take(RUN.run_id)
    assert exports(worker) == 1
    await snapshots.take(RUN.run_id)  # nothing has changed since
    assert exports(worker) == 1
    await snapshots.close()


async def test_what_was_loaded_is_safe_before_it_is_said_to_be_loaded(worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 30.0)
    snapshots.changed([a_step(1)], has_gradient=True)
    await snapshots.loaded(a_step(2), await worker.export_adapter(RUN.run_id, with_optimizer=True))
    assert snapshots.stored(RUN.run_id) == 2 and not snapshots.has_gradient(RUN.run_id)
    assert snapshots.history.take_all() == [] and snapshots.seconds_until_due() is None


async def test_a_run_that_is_given_up_says_why(worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 0.0)
    snapshots.changed([a_step(1)], has_gradient=False)
    snapshots.give_up(RUN.run_id, "it is gone")
    with pytest.raises(ServerFault, match="it is gone"):
        await snapshots.read(RUN.run_id)
    assert snapshots.seconds_until_due() is None and snapshots.history.take_all() == []
