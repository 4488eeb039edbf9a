"""A service whose worker has room for few adapters answers just as one that has room for all."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_service import MODEL, Tenant, make_service
from hypothesis import given, settings
from hypothesis import strategies as st
from mortal_worker import MortalWorker, make_mortal_service
from random_client import KINDS, Client, a_pass, a_step, bits

from twinkle.protocol import messages as m
from twinkle.protocol.types import ForwardBackwardOutput, ModelInput
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.scheduling.runs import RunState
from twinkle.server.service.service import Service

# An adapter of rank 2 on the fake model, with moments and a gradient: see `engine/test_residency.py`.
FULL = 4 * 2 * 4 * (3 * 8 + 8 + 8 + 16)
HARDLY_EVER = 3600.0


# ------------------------------------------------------------ any jobs in any order


async def outcome_of(
    directory: Path, ranks: list[int], batches: list[list[tuple[int, str]]], adapter_bytes: int | None
) -> tuple[list[Any], list[dict[str, bytes]]]:
    backend = FakeBackend(ModelConfig(Path("fake")))
    service = make_service(directory, backend, adapter_bytes=adapter_bytes)
    await service.start()
    try:
        client = Client(Tenant(service, "alice"))
        await client.begin(ranks)
        for batch in batches:
            await client.send(batch)
        states: list[dict[str, bytes]] = []
        for number, run in enumerate(client.runs):
            await client.send([(number, "forward")])  # so that it is on the worker
            states.append(bits(backend.export_adapter(run, with_optimizer=True, with_gradients=True)))
        if adapter_bytes is not None:
            _check_kept(service, backend, adapter_bytes)
        return client.shown(), states
    finally:
        await service.close()


def _check_kept(service: Service, backend: FakeBackend, adapter_bytes: int) -> None:
    """After a job that needs one adapter: the rest is what there is room for, and the books are right."""
    resident = [run for run in service.parts.live if run.state is RunState.RESIDENT]
    assert {run.run_id for run in resident} == set(backend._adapters)
    assert sum(run.bytes for run in resident) <= adapter_bytes or len(resident) == 1


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.sampled_from(KINDS)), min_size=1, max_size=10), max_size=4
    ),
    adapter_bytes=st.integers(1, 3 * FULL),
)
def test_any_requests_have_the_same_outcome_as_without_a_budget(ranks, batches, adapter_bytes):
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        bounded = asyncio.run(outcome_of(Path(small), ranks, batches, adapter_bytes))
        unbounded = asyncio.run(outcome_of(Path(large), ranks, batches, None))
    assert not any(isinstance(outcome, str) for outcome in unbounded[0]), "a request failed"
    assert bounded == unbounded


# ------------------------------------------------------------ each kind of job on a run that is on disk


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(ModelConfig(Path("fake")))


@pytest.fixture
async def alice(tmp_path: Path, backend: FakeBackend) -> AsyncIterator[Tenant]:
    """On a service with room for one run with a gradient."""
    service = make_service(tmp_path, backend, adapter_bytes=FULL)
    await service.start()
    yield Tenant(service, "alice")
    await service.close()


async def evicted_run(alice: Tenant, backend: FakeBackend) -> str:
    """A run with a step and a gradient, which has made room for another; its next `seq_id` is 4."""
    run = await alice.run()
    for request in (a_pass(run, 1), a_step(run, 2), a_pass(run, 3)):
        assert not isinstance(await alice.do(request), m.Failure)
    await alice.run()
    assert run not in backend._adapters
    return run


async def undisturbed_norm(alice: Tenant, tokens_of_passes: int) -> float:
    """Of the gradient in the second step of a run with so many passes before it."""
    other = await alice.run()
    await alice.do(a_pass(other, 1))
    await alice.do(a_step(other, 2))
    for seq_id in range(3, 3 + tokens_of_passes):
        await alice.do(a_pass(other, seq_id))
    return (await alice.do(a_step(other, 3 + tokens_of_passes))).metrics["grad_norm:mean"]


async def test_it_goes_on_accumulating_and_steps(alice: Tenant, backend: FakeBackend, tmp_path: Path):
    run = await evicted_run(alice, backend)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run]
    assert isinstance(await alice.do(a_pass(run, 4)), ForwardBackwardOutput)
    assert run in backend._adapters
    await alice.run()
    assert run not in backend._adapters
    norm = (await alice.do(a_step(run, 5))).metrics["grad_norm:mean"]
    assert norm == await undisturbed_norm(alice, 2)


async def test_it_can_be_saved_sampled_and_loaded(alice: Tenant, backend: FakeBackend):
    run = await evicted_run(alice, backend)
    assert isinstance(
        await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=4, path="here")), m.SaveWeightsResponse
    )
    saved = bits(backend.export_adapter(run, with_optimizer=True))
    await alice.run()
    published = await alice.do(
        m.SaveWeightsForSamplerRequest(model_id=run, seq_id=5, sampling_session_seq_id=0)
    )
    sample = m.SampleRequest(
        sampling_session_id=published.sampling_session_id, seq_id=0, prompt=ModelInput.from_ints([1])
    )
    assert not isinstance(await alice.do(sample), m.Failure)
    await alice.run()
    external = await alice.do(m.SaveWeightsForSamplerRequest(model_id=run, seq_id=6, path="named"))
    assert isinstance(external, m.SaveWeightsForSamplerResponse)
    await alice.do(a_step(run, 7))
    await alice.run()
    load = m.LoadWeightsRequest(model_id=run, seq_id=8, path=f"twinkle://{run}/weights/here", optimizer=True)
    assert isinstance(await alice.do(load), m.LoadWeightsResponse)
    assert bits(backend.export_adapter(run, with_optimizer=True)) == saved


async def test_it_can_be_unloaded_where_it_is(alice: Tenant, backend: FakeBackend, tmp_path: Path):
    run = await evicted_run(alice, backend)
    assert isinstance(await alice.do(m.UnloadModelRequest(model_id=run)), m.UnloadModelResponse)
    await alice.service.parts.snapshots.close()
    assert list((tmp_path / "runs").iterdir()) == []


async def test_it_fails_alone_if_its_file_is_damaged_and_a_checkpoint_begins_anew(
    alice: Tenant, backend: FakeBackend, tmp_path: Path
):
    run = await evicted_run(alice, backend)
    (tmp_path / "runs" / run / "3.safetensors").write_bytes(b"not what it was")
    other = await alice.run()
    promises = [await alice.service.submit("alice", a_pass(r, s)) for r, s in ((run, 4), (other, 1))]
    failed, done = [await alice.outcome(promise) for promise in promises]
    assert isinstance(failed, m.Failure) and failed.category == "server"
    assert "can't be read from the disk" in failed.error
    assert isinstance(done, ForwardBackwardOutput)


async def test_a_run_that_cannot_be_made_is_gone_and_the_next_one_is_made(
    alice: Tenant, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object) -> None:
        raise MemoryError("too much")

    request = m.CreateModelRequest(session_id=await alice.session(), model_seq_id=0, base_model=MODEL)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "add_adapter", fails)
        assert isinstance(await alice.do(request), m.Failure)
    assert not list(alice.service.parts.live) and backend._adapters == {}
    assert isinstance(await alice.do(request), m.CreateModelResponse)


async def test_more_runs_at_once_than_fit_take_turns(tmp_path: Path):
    most = 0

    class Watched(FakeBackend):
        def forward_backward(self, micro_batches):
            nonlocal most
            most = max(most, len(self._adapters))
            return super().forward_backward(micro_batches)

    service = make_service(tmp_path, Watched(ModelConfig(Path("fake"))), adapter_bytes=2 * FULL)
    await service.start()
    alice = Tenant(service, "alice")
    runs = [await alice.run() for _ in range(7)]
    for seq_id in (1, 3):
        requests = [r for run in runs for r in (a_pass(run, seq_id), a_step(run, seq_id + 1))]
        promises = [await service.submit("alice", request) for request in requests]
        outcomes = [await alice.outcome(promise) for promise in promises]
        assert not any(isinstance(outcome, m.Failure) for outcome in outcomes)
    assert most == 2
    await service.close()


# ------------------------------------------------------------ a lost worker


@pytest.fixture
async def worker() -> MortalWorker:
    return MortalWorker()


@pytest.fixture
async def bob(tmp_path: Path, worker: MortalWorker) -> AsyncIterator[Tenant]:
    """On a service with room for one run with a gradient, which takes next to no snapshots."""
    service = make_mortal_service(tmp_path, worker, HARDLY_EVER, adapter_bytes=FULL)
    await service.start()
    yield Tenant(service, "bob")
    await service.close()


def adapters_on(worker: MortalWorker) -> list[str]:
    backend = worker._backend
    assert isinstance(backend, FakeBackend)
    return list(backend._adapters)


async def test_a_run_on_disk_loses_nothing_with_the_worker_and_is_left_there(
    bob: Tenant, worker: MortalWorker
):
    run, other = await bob.run(), await bob.run(seed=1)
    for request in (a_pass(run, 1), a_step(run, 2), a_pass(run, 3), a_pass(other, 1), a_step(other, 2)):
        assert not isinstance(await bob.do(request), m.Failure)
    assert adapters_on(worker) == [other]
    worker.die()
    while worker.restarts < 1:
        await asyncio.sleep(0.005)
    assert isinstance(await bob.do(a_pass(other, 3)), ForwardBackwardOutput)
    assert adapters_on(worker) == [other]
    norm = (await bob.do(a_step(run, 4))).metrics["grad_norm:mean"]
    assert norm == await undisturbed_norm(bob, 1)


@pytest.mark.parametrize(
    "method", ["export_adapter", "remove_adapter", "add_adapter", "import_adapter", "forward_backward"]
)
async def test_a_worker_that_is_lost_in_the_midst_of_a_move_takes_nothing_of_the_run_that_comes_back(
    bob: Tenant, worker: MortalWorker, method: str
):
    run, other = await bob.run(), await bob.run(seed=1)
    for request in (a_pass(run, 1), a_step(run, 2), a_pass(run, 3), a_pass(other, 1)):
        assert not isinstance(await bob.do(request), m.Failure)
    assert adapters_on(worker) == [other]
    worker.kills = lambda name, args: name == method and "warm-up" not in args and not worker.restarts
    assert isinstance(await bob.do(a_pass(run, 4)), ForwardBackwardOutput)
    assert worker.restarts == 1
    norm = (await bob.do(a_step(run, 5))).metrics["grad_norm:mean"]
    assert norm == await undisturbed_norm(bob, 2)


async def test_a_run_whose_return_ends_the_process_each_time_fails_alone(bob: Tenant, worker: MortalWorker):
    run = await bob.run()
    await bob.do(a_pass(run, 1))
    other = await bob.run(seed=1)
    worker.kills = lambda name, args: name == "import_adapter" and args[0] == run
    outcome = await bob.do(a_pass(run, 2))
    assert isinstance(outcome, m.Failure) and "did so again" in outcome.error
    assert isinstance(await bob.do(a_pass(other, 1)), ForwardBackwardOutput)


# ------------------------------------------------------------ the real backend


async def states_after(tiny_model_dir: Path, directory: Path, adapter_bytes: int | None) -> list[Any]:
    """Three runs in turn: two passes each, round by round, then a step; and once more."""
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    service = make_service(directory, backend, adapter_bytes=adapter_bytes)
    await service.start()
    alice = Tenant(service, "alice")
    runs = [await alice.run(rank=4, seed=seed) for seed in range(3)]
    for seq_id in range(1, 7):
        for number, run in enumerate(runs):
            tokens = (seq_id, 7, 9 + number, 30)
            request = a_step(run, seq_id) if seq_id % 3 == 0 else a_pass(run, seq_id, tokens)
            assert not isinstance(await alice.do(request), m.Failure)
    states: list[Any] = []
    for run in runs:
        await alice.do(a_pass(run, 7, (1, 2)))
        states.append(bits(backend.export_adapter(run, with_optimizer=True, with_gradients=True)))
    if adapter_bytes is not None:
        assert len(backend._adapters) == 1
    await service.close()
    return states


async def test_a_run_that_left_and_came_back_in_mid_accumulation_ends_with_the_same_bits(
    tiny_model_dir: Path, tmp_path: Path
):
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    moved = await states_after(tiny_model_dir, tmp_path / "small", 1)
    stayed = await states_after(tiny_model_dir, tmp_path / "large", None)
    assert moved == stayed
    assert len({state["step"] for state in moved}) == 1 and moved[0] != moved[1]
    assert any(
        np.frombuffer(array, np.float32).any() for name, array in moved[0].items() if "gradients" in name
    )
