"""Who is on the worker, who leaves and comes back, and what a lost worker or a full disk does to that."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mortal_worker import MortalWorker

from twinkle.protocol import messages as m
from twinkle.protocol.types import AdamParams, Datum, ModelInput
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, AdapterState, Row
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.scheduling.runs import Job, Run, RunState
from twinkle.server.scheduling.scheduler import Tick
from twinkle.server.store.files import LocalFiles
from twinkle.server.store.run_files import RunFiles

# Bytes of an adapter of rank 1 on the fake model's three layers (8 -> 8, 8 -> 8, 8 -> 16): its weights alone, with
# moments, and with a gradient.
ROW = 4 * (3 * 8 + 8 + 8 + 16)
IDLE, FULL = 3 * ROW, 4 * ROW
TOKENS = np.array([1, 2, 3])


class Bench:
    """Runs on a worker, as the engine handles them."""

    def __init__(self, directory: Path, worker: MortalWorker, budget: int | None) -> None:
        self.now = 0.0
        self.worker = worker
        self.files = RunFiles(LocalFiles(directory / "runs"))
        self.runs: dict[str, Run] = {}
        self.seq_ids = count(1)
        self.snapshots = Snapshots(worker, self.files, 3600.0, clock=lambda: self.now)
        self.residency = Residency(worker, self.snapshots, budget, lambda: self.now)

    async def create(self, *run_ids: str, rank: int = 1, tenant: str = "alice") -> None:
        for run_id in run_ids:
            spec = AdapterSpec(rank=rank, seed=len(self.runs))
            run = self.runs[run_id] = Run(run_id, tenant, "session", "fake/model", spec)
            await self.residency.bring_in([run])
            await self.worker.add_adapter(run_id, spec)
            self.residency.added(run)

    async def bring_in(self, *run_ids: str, adding_gradients: bool = False) -> None:
        await self.residency.bring_in([self.runs[run_id] for run_id in run_ids], adding_gradients)

    def end(self, run_id: str) -> None:
        self.residency.drop(self.runs[run_id], RunState.ENDED)
        self.snapshots.drop(self.runs[run_id])

    async def accumulate(self, run_id: str) -> None:
        await self.bring_in(run_id, adding_gradients=True)
        inputs = {"target_tokens": TOKENS, "weights": np.ones(3, np.float32)}
        await self.worker.forward_backward([[Row(run_id, TOKENS, "cross_entropy", inputs)]])
        self.snapshots.computed([self.a_pass(run_id, next(self.seq_ids))])

    async def step(self, run_id: str) -> None:
        await self.bring_in(run_id)
        await self.worker.optim_step([AdamStep(run_id, AdamParams(learning_rate=0.1))])
        self.snapshots.computed((), [self.a_step(run_id, next(self.seq_ids))])

    async def state(self, run_id: str) -> AdapterState:
        return await self.worker.export_adapter(run_id, with_optimizer=True, with_gradients=True)

    @property
    def resident(self) -> list[str]:
        """Those that the worker has. Each other run must be evicted, with a file if it ever changed; sums are right."""
        on_worker: list[str] = sorted(self.worker._backend._adapters)
        for run_id, run in self.runs.items():
            assert (run.state is RunState.EVICTED) == (run_id not in on_worker)
            if run_id not in on_worker and run.changed:
                self.files.read(run_id, run.changed)
        assert sum(run.bytes for run in self.runs.values()) == self.residency.total_bytes
        return on_worker

    def a_pass(self, run_id: str, seq_id: int = 0) -> Job:
        return a_pass(self.runs[run_id], seq_id)

    def a_step(self, run_id: str, seq_id: int = 0) -> Job:
        return a_step(self.runs[run_id], seq_id)

    def written(self) -> int:
        """How many exports with moments there were."""
        return sum(name == "export_adapter" and args[1] is True for name, args in self.worker.calls)


@pytest.fixture
async def worker() -> MortalWorker:
    return MortalWorker()


@pytest.fixture
async def bench(tmp_path: Path, worker: MortalWorker) -> AsyncIterator[Bench]:
    """Room for two runs with a gradient, and a bit."""
    bench = Bench(tmp_path, worker, 2 * FULL + 4)
    yield bench
    await bench.snapshots.close()


async def test_without_a_budget_everything_stays_and_nothing_is_measured(
    tmp_path: Path, worker: MortalWorker
):
    bench = Bench(tmp_path, worker, None)
    await bench.create("a", "b", "c")
    for run_id in "abc":
        await bench.accumulate(run_id)
    assert bench.resident == ["a", "b", "c"]
    assert {name for name, _ in worker.calls} == {"add_adapter", "forward_backward"}
    tick = Tick.of([bench.a_pass("a"), bench.a_pass("b")])
    assert bench.residency.split(tick) == [tick]
    await bench.snapshots.close()


async def test_the_least_recently_used_leave_and_come_back_as_they_were(bench: Bench):
    await bench.create("a", "b")
    await bench.accumulate("a")
    await bench.step("a")
    await bench.accumulate("a")
    before = await bench.state("a")
    await bench.accumulate("b")
    assert bench.resident == ["a", "b"]
    await bench.create("c")
    assert bench.resident == ["b", "c"]
    await bench.bring_in("a")  # with its gradient, so that both others have to make room, or one
    assert bench.resident == ["a", "c"]
    after = await bench.state("a")
    assert after.spec == before.spec
    assert before.optimizer is not None and after.optimizer is not None and after.optimizer.step == 1
    for mine, theirs in (
        (after.weights, before.weights),
        (after.gradients, before.gradients),
        (after.optimizer.exp_avg, before.optimizer.exp_avg),
        (after.optimizer.exp_avg_sq, before.optimizer.exp_avg_sq),
    ):
        assert mine is not None and theirs is not None
        assert {name: matrix.tobytes() for name, matrix in mine.items()} == {
            name: matrix.tobytes() for name, matrix in theirs.items()
        }


async def test_who_has_most_there_makes_room(bench: Bench):
    await bench.create("mine", tenant="modest")
    await bench.accumulate("mine")
    await bench.step("mine")
    await bench.create("a", tenant="greedy")
    before = await bench.state("mine")
    for run_id in ("b", "c", "d", "a", "b"):
        if run_id not in bench.runs:
            await bench.create(run_id, tenant="greedy")
        await bench.bring_in(run_id)
        assert "mine" in bench.resident, "the least recently used of all, and not to leave"
    after = await bench.state("mine")
    assert {n: a.tobytes() for n, a in after.weights.items()} == {
        n: a.tobytes() for n, a in before.weights.items()
    }


async def test_bytes_are_those_of_rank_moments_and_gradient(bench: Bench):
    await bench.create("a")
    assert bench.residency.total_bytes == IDLE
    await bench.accumulate("a")
    assert bench.residency.total_bytes == FULL
    await bench.step("a")
    await bench.bring_in()
    assert bench.residency.total_bytes == IDLE
    await bench.create("wide", rank=2)  # 2 * IDLE fits beside what is left of "a" only without it
    assert bench.resident == ["wide"]
    assert bench.residency.total_bytes == 2 * IDLE
    bench.end("wide")
    assert bench.residency.total_bytes == 0


async def test_what_is_in_use_stays_though_it_exceeds_the_budget_and_leaves_when_it_no_longer_is(
    bench: Bench,
):
    await bench.create("a", "b", "c", "d")
    await bench.bring_in("a", "b", "c")
    assert bench.resident == ["a", "b", "c"]
    assert bench.residency.total_bytes == 3 * IDLE
    await bench.bring_in("d")
    assert len(bench.resident) == 2 and "d" in bench.resident


async def test_what_a_later_step_of_the_tick_needs_is_the_last_to_leave(bench: Bench):
    await bench.create("a", "b", "c")
    assert bench.resident == ["b", "c"]
    bench.residency.expect(Tick.of([bench.a_step("b")]))
    await bench.bring_in("a")
    assert bench.resident == ["a", "b"]


async def test_what_has_not_changed_is_not_written_again(bench: Bench):
    await bench.create("a", "b", "c")
    assert (bench.resident, bench.written()) == (["b", "c"], 0)  # a new adapter's seed makes it again
    await bench.accumulate("b")
    await bench.bring_in("a")
    await bench.bring_in("c")
    assert (bench.resident, bench.written()) == (["a", "c"], 1)
    await bench.bring_in("b")
    await bench.bring_in("a")
    await bench.bring_in("c")
    assert (bench.resident, bench.written()) == (["a", "c"], 1)


async def test_a_run_that_ends_takes_its_file_along_wherever_it_is(bench: Bench):
    await bench.create("a", "b")
    await bench.accumulate("a")
    await bench.accumulate("b")
    await bench.create("c", "d")
    await bench.bring_in("a")
    for run_id in ("a", "b"):  # one is on the worker, one isn't, both have files
        bench.end(run_id)
    await bench.snapshots.close()
    assert [bench.files.numbers(run_id) for run_id in "ab"] == [[], []]


async def test_where_a_copy_would_be_due_it_is_taken(bench: Bench):
    await bench.create("a", "b")
    await bench.accumulate("a")
    await bench.step("a")
    await bench.accumulate("a")
    await bench.bring_in("b")
    await bench.create("c")
    assert bench.resident == ["b", "c"]
    assert bench.snapshots.seconds_until_due() is None
    assert not any(run.is_ahead_of_snapshot for run in bench.runs.values())
    assert bench.snapshots.take_unsaved() == []
    copy = await bench.snapshots.read(bench.runs["a"])
    assert copy is not None and copy.gradients is not None


async def test_a_full_disk_keeps_a_run_where_it_is_and_is_left_alone_for_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    attempts: list[str] = []

    def full(run_id: str, _number: int, _state: AdapterState) -> None:
        attempts.append(run_id)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bench.files, "write", full)
        await bench.create("a", "b")
        await bench.accumulate("a")
        await bench.accumulate("b")
        await bench.create("c", "d")
    assert bench.resident == ["a", "b", "c", "d"]
    assert attempts == ["a"]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said[-1].startswith("run a could not be written to disk")
    await bench.accumulate("d")
    assert bench.resident == ["a", "b", "c", "d"]
    bench.now = 100.0
    await bench.accumulate("d")
    assert bench.resident == ["c", "d"]


@pytest.mark.parametrize("method", ["export_adapter", "remove_adapter", "add_adapter", "import_adapter"])
async def test_after_a_loss_in_the_midst_of_a_move_each_run_is_its_copy(
    bench: Bench, worker: MortalWorker, method: str
):
    await bench.create("a")
    await bench.accumulate("a")
    await bench.create("b", "c")
    await bench.accumulate("b")
    assert bench.resident == ["b", "c"]
    await bench.bring_in("c")
    worker.kills = lambda name, args: name == method and args[0] in ("a", "b")
    with pytest.raises(WorkerLost):
        await bench.bring_in("a")
    worker.kills = lambda _name, _args: False
    await worker.restart()
    bench.residency.worker_lost()
    assert bench.resident == []
    # What no copy has is what was not copied before the loss.
    again = [job.run.run_id for call in bench.snapshots.take_unsaved() for job in call]
    assert again == (["b"] if method == "export_adapter" else [])
    await bench.bring_in("a")
    assert bench.resident == ["a"]
    assert bench.runs["a"].has_gradient


async def test_a_run_that_cannot_be_put_back_stays_evicted(
    bench: Bench, worker: MortalWorker, monkeypatch: pytest.MonkeyPatch
):
    await bench.create("a", "b")
    await bench.accumulate("a")
    await bench.accumulate("b")
    await bench.create("c", "d")

    def fails(*_: object) -> None:
        raise MemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(worker._backend, "import_adapter", fails)
        with pytest.raises(MemoryError):
            await bench.bring_in("a")
    assert "a" not in bench.resident
    await bench.bring_in("a")
    assert "a" in bench.resident


# ------------------------------------------------------------ parts of a tick


def a_pass(run: Run, seq_id: int = 0) -> Job:
    data = [Datum(ModelInput.from_ints([0]))]
    request = m.ForwardBackwardRequest(run.run_id, seq_id, data, "cross_entropy")
    return Job(f"{run.run_id}-{seq_id}", run, seq_id, request, 1)


def a_step(run: Run, seq_id: int = 0) -> Job:
    request = m.OptimStepRequest(model_id=run.run_id, seq_id=seq_id)
    return Job(f"{run.run_id}-{seq_id}", run, seq_id, request)


def an_other(run: Run, seq_id: int = 0) -> Job:
    request = m.SaveWeightsRequest(model_id=run.run_id, seq_id=seq_id, path="p")
    return Job(f"{run.run_id}-{seq_id}", run, seq_id, request)


async def test_a_tick_is_split_so_that_each_part_fits_and_what_is_there_comes_first(bench: Bench):
    await bench.create("a", "b", "c")
    a, b, c = (bench.runs[run_id] for run_id in "abc")
    jobs = [a_pass(a, 1), a_pass(b, 1), a_pass(c, 1), a_pass(a, 2), a_step(b, 2), an_other(a, 3)]
    parts = bench.residency.split(Tick.of(jobs))
    assert [[job.request_id for job in part.jobs] for part in parts] == [
        ["b-1", "c-1", "b-2"],
        ["a-1", "a-2", "a-3"],
    ]


async def test_an_empty_tick_stays_one(bench: Bench):
    assert bench.residency.split(Tick()) == [Tick()]


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    steps=st.lists(st.booleans(), min_size=8, max_size=8),
    budget=st.integers(1, 30 * ROW),
)
def test_no_part_needs_more_than_the_budget_unless_it_has_one_run(ranks, steps, budget):
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(check_parts(Path(directory), ranks, steps, budget))


async def check_parts(directory: Path, ranks: list[int], steps: list[bool], budget: int) -> None:
    bench = Bench(directory, MortalWorker(), budget)
    for number, rank in enumerate(ranks):
        await bench.create(str(number), rank=rank)
    runs = list(bench.runs.values())
    passes = [a_pass(run) for run in runs]
    tick = Tick.of([*passes, *(a_step(run, 1) for run, has in zip(runs, steps, strict=False) if has)])
    parts = bench.residency.split(tick)
    for part in parts:
        of_part = {job.run for job in part.jobs}
        assert len(of_part) == 1 or sum(FULL * run.spec.rank for run in of_part) <= budget
    assert sorted(job.request_id for part in parts for job in part.passes) == sorted(
        job.request_id for job in tick.passes
    )
    assert {job for part in parts for job in part.optim_steps} == set(tick.optim_steps)
    assert len(parts) <= math.ceil(2 * FULL * sum(ranks) / budget) + 1
    await bench.snapshots.close()
