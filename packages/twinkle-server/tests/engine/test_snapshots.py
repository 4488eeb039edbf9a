"""When copies of runs are taken, and what is left of them on disk."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mortal_worker import MortalWorker

from twinkle.protocol import messages as m
from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.scheduling.runs import Job, Run, RunState
from twinkle.server.store.files import LocalFiles
from twinkle.server.store.run_files import RunFiles

RUN_ID, SPEC = "session:train:0", AdapterSpec(rank=2)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def worker() -> MortalWorker:
    worker = MortalWorker()
    await worker.add_adapter(RUN_ID, SPEC)
    return worker


@pytest.fixture
def run() -> Run:
    return a_run(RUN_ID)


def a_run(run_id: str) -> Run:
    return Run(run_id, "alice", "session", "fake/model", SPEC, state=RunState.RESIDENT)


def make(worker: MortalWorker, directory: Path, seconds: float | None) -> Snapshots:
    return Snapshots(worker, RunFiles(LocalFiles(directory / "s")), seconds, clock=Clock())


def a_step(run: Run, seq_id: int, tokens: int = 0) -> Job:
    request = m.OptimStepRequest(model_id=run.run_id, seq_id=seq_id)
    return Job(f"{run.run_id}-{seq_id}", run, seq_id, request, tokens)


def end(snapshots: Snapshots, run: Run) -> None:
    run.state = RunState.ENDED
    snapshots.drop(run)


def exports(worker: MortalWorker) -> int:
    return sum(method == "export_adapter" for method, _ in worker.calls)


def at(snapshots: Snapshots, now: float) -> None:
    assert isinstance(snapshots.clock, Clock)
    snapshots.clock.now = now


async def test_a_run_is_copied_once_a_period_and_an_idle_one_no_more(
    run: Run, worker: MortalWorker, tmp_path: Path
):
    snapshots = make(worker, tmp_path, 30.0)
    assert snapshots.seconds_until_due() is None
    for seq_id, now in enumerate((1.0, 2.0, 20.0), start=1):
        at(snapshots, now)
        snapshots.computed((), [a_step(run, seq_id)])
        await snapshots.take_due()
    assert exports(worker) == 0
    assert snapshots.seconds_until_due() == 11.0  # since the first step
    at(snapshots, 31.0)
    await snapshots.take_due()
    assert exports(worker) == 1
    assert not run.is_ahead_of_snapshot and snapshots.take_unsaved() == []
    at(snapshots, 1000.0)
    await snapshots.take_due()
    assert exports(worker) == 1
    assert snapshots.seconds_until_due() is None
    await snapshots.close()


@pytest.mark.parametrize(("jobs", "tokens"), [(512, 0), (2, 2**19)])
async def test_much_that_would_have_to_be_computed_again_is_copied_at_once(
    run: Run, worker: MortalWorker, tmp_path: Path, jobs: int, tokens: int
):
    snapshots = make(worker, tmp_path, 30.0)
    for seq_id in range(1, jobs):
        snapshots.computed([a_step(run, seq_id, tokens)])
    assert snapshots.seconds_until_due() == 30.0
    snapshots.computed([a_step(run, jobs, tokens)])
    assert snapshots.seconds_until_due() == 0.0


@pytest.mark.parametrize(("cost", "pause"), [(0.5, 0.5 / 0.02), (10.0, 60.0)])
async def test_copies_that_take_long_are_taken_seldom_within_bounds(
    run: Run, worker: MortalWorker, tmp_path: Path, cost: float, pause: float
):
    snapshots = make(worker, tmp_path, 1.0)
    worker.note_after = lambda _method: at(snapshots, snapshots.clock() + cost)
    snapshots.computed((), [a_step(run, 1)])
    at(snapshots, 1.0)
    await snapshots.take_due()
    snapshots.computed((), [a_step(run, 2)])
    assert snapshots.seconds_until_due() == pause
    await snapshots.close()


async def test_the_newest_copy_alone_stays_on_disk_and_is_what_is_read(
    run: Run, worker: MortalWorker, tmp_path: Path
):
    snapshots = make(worker, tmp_path, 0.0)
    for seq_id in range(1, 4):
        await worker.optim_step([AdamStep(RUN_ID, AdamParams(learning_rate=0.1, weight_decay=0.5))])
        jobs = [a_step(run, seq_id)]
        snapshots.computed(*((jobs, ()) if seq_id == 3 else ((), jobs)))
        await snapshots.take_due()
    in_memory = await snapshots.read(run)
    assert in_memory is not None and in_memory.optimizer is not None and in_memory.optimizer.step == 3
    assert in_memory.gradients is not None
    assert await snapshots.written(run)
    assert [path.name for path in (tmp_path / "s" / RUN_ID).iterdir()] == ["3.safetensors"]
    assert run.snapshot.stored == 3
    on_disk = await snapshots.read(run)
    assert on_disk is not None and on_disk.optimizer is not None and on_disk.optimizer.step == 3
    for name, weights in in_memory.weights.items():
        np.testing.assert_array_equal(on_disk.weights[name], weights)
    end(snapshots, run)
    await snapshots.close()
    assert list((tmp_path / "s").iterdir()) == []


async def test_a_copy_waits_for_what_the_run_still_writes(run: Run, worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 0.0)
    settled = asyncio.Event()

    async def write() -> None:
        await settled.wait()

    run.add_write(asyncio.create_task(write()))
    snapshots.computed((), [a_step(run, 1)])
    await snapshots.take_due()
    await asyncio.sleep(0.02)
    assert run.snapshot.stored is None and not (tmp_path / "s").exists()
    settled.set()
    assert await snapshots.written(run)
    assert run.snapshot.stored == 1


async def test_a_run_that_ends_while_its_copy_is_written_leaves_nothing(
    run: Run, worker: MortalWorker, tmp_path: Path
):
    snapshots = make(worker, tmp_path, 0.0)
    snapshots.computed((), [a_step(run, 1)])
    await snapshots.take_due()
    end(snapshots, run)
    await snapshots.close()
    assert list(tmp_path.glob("s/*")) == []


async def test_a_copy_that_cannot_be_written_is_kept_in_memory_and_written_when_it_can_be(
    run: Run, worker: MortalWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    snapshots = make(worker, tmp_path, 0.0)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots.files, "write", full)
        snapshots.computed((), [a_step(run, 1)])
        await snapshots.take_due()
        assert not await snapshots.written(run)
    assert await snapshots.read(run) is not None
    assert snapshots.seconds_until_due() == 10.0
    at(snapshots, 10.0)
    await snapshots.take_due()
    await snapshots.close()
    assert exports(worker) == 1 and run.snapshot.stored == 1


async def test_without_files_nothing_is_kept(run: Run, worker: MortalWorker):
    snapshots = Snapshots(worker, None, 0.0)
    snapshots.computed((), [a_step(run, 1)])
    await snapshots.take_due()
    assert exports(worker) == 0


async def test_where_nothing_can_be_lost_copies_are_taken_on_demand_alone(
    run: Run, worker: MortalWorker, tmp_path: Path
):
    snapshots = make(worker, tmp_path, None)
    snapshots.computed((), [a_step(run, 1)])
    snapshots.hurry(run)
    assert snapshots.seconds_until_due() is None
    assert snapshots.take_unsaved() == []  # it would grow for ever
    await snapshots.take(run)
    assert exports(worker) == 1
    await snapshots.take(run)  # nothing has changed since
    assert exports(worker) == 1
    await snapshots.close()


async def test_what_was_loaded_is_safe_before_it_is_said_to_be_loaded(
    run: Run, worker: MortalWorker, tmp_path: Path
):
    snapshots = make(worker, tmp_path, 30.0)
    snapshots.computed([a_step(run, 1)])
    await snapshots.loaded(a_step(run, 2), await worker.export_adapter(RUN_ID, with_optimizer=True))
    assert run.snapshot.stored == 2 and not run.has_gradient
    assert snapshots.take_unsaved() == [] and snapshots.seconds_until_due() is None


async def test_a_run_that_is_given_up_says_why(run: Run, worker: MortalWorker, tmp_path: Path):
    snapshots = make(worker, tmp_path, 0.0)
    snapshots.computed((), [a_step(run, 1)])
    run.lost = "it is gone"
    snapshots.drop(run)
    with pytest.raises(ServerFault, match="it is gone"):
        await snapshots.read(run)
    assert snapshots.seconds_until_due() is None and snapshots.take_unsaved() == []


# ------------------------------------------------------------ what has to be computed again, and in which calls


def names(calls: list[tuple[Job, ...]]) -> list[list[str]]:
    return [[job.request_id for job in call] for call in calls]


def some_runs() -> tuple[Snapshots, dict[str, Run]]:
    unused: MortalWorker = None  # pyright: ignore[reportAssignmentType]
    return make(unused, Path("never written"), 30.0), {name: a_run(name) for name in "abc"}


def test_calls_come_in_their_order_with_the_jobs_in_theirs_once():
    snapshots, runs = some_runs()
    a, b = runs["a"], runs["b"]
    snapshots.computed((), [a_step(b, 1), a_step(a, 1), a_step(b, 2)])
    snapshots.computed((), [a_step(a, 2)])
    assert names(snapshots.take_unsaved()) == [["b-1", "a-1", "b-2"], ["a-2"]]
    assert snapshots.take_unsaved() == []


async def take(snapshots: Snapshots, run: Run, seq_id: int) -> None:
    """As if a snapshot were taken behind that request, though later ones have been computed."""
    changed, run.changed = run.changed, seq_id
    await snapshots.take(run)
    run.changed = changed


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
        max_size=8,
    ),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 12)),
    st.sets(st.sampled_from("abc")),
)
def test_the_rest_is_what_was_added_less_what_snapshots_have_and_runs_that_ended(
    calls: list[list[str]], taken: dict[str, int], ended: set[str]
):
    snapshots, runs = some_runs()
    last, added = dict.fromkeys("abc", 0), list[list[Job]]()

    async def play() -> list[tuple[Job, ...]]:
        snapshots.worker = MortalWorker()
        for run in runs.values():
            await snapshots.worker.add_adapter(run.run_id, SPEC)
        for call in calls:
            jobs: list[Job] = []
            for name in call:
                last[name] += 1
                jobs.append(a_step(runs[name], last[name]))
            snapshots.computed((), jobs)
            added.append(jobs)
        for name, seq_id in taken.items():
            await take(snapshots, runs[name], seq_id)
        for name in ended:
            end(snapshots, runs[name])
        await snapshots.close()
        return snapshots.take_unsaved()

    with tempfile.TemporaryDirectory() as directory:
        snapshots.files = RunFiles(LocalFiles(Path(directory)))
        found = asyncio.run(play())
    left = [
        tuple(
            job for job in call if job.seq_id > taken.get(job.run.run_id, 0) and job.run.run_id not in ended
        )
        for call in added
    ]
    assert found == [call for call in left if call]
