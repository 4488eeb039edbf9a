"""A lost process of the model, through the service's own face: nothing is lost with it, and clients needn't know."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_service import MODEL, Tenant
from mortal_worker import MortalWorker, make_mortal_service
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.types import ForwardBackwardOutput, ModelInput
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.service import service as service_module
from twinkle.server.service.service import Service

AFTER_EVERY_STEP, HARDLY_EVER = 0.0, 3600.0
TOKENS = np.array([1, 2, 3])


def calls_of(worker: MortalWorker, method: str) -> list[tuple[Any, ...]]:
    return [args for name, args in worker.calls if name == method]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def train(tenant: Tenant, run: str, steps: int, first_seq_id: int = 1) -> None:
    for seq_id in range(first_seq_id, first_seq_id + 2 * steps, 2):
        assert isinstance(await tenant.do(a_pass(run, seq_id)), ForwardBackwardOutput)
        assert isinstance(await tenant.do(a_step(run, seq_id + 1)), m.OptimStepResponse)


@pytest.fixture
async def worker() -> MortalWorker:
    return MortalWorker()


Begin = Callable[[float], Awaitable[Service]]


@pytest.fixture
async def begin(worker: MortalWorker, tmp_path: Path) -> AsyncIterator[Begin]:
    """Starts a service on the worker, given how often it takes snapshots."""
    services: list[Service] = []

    async def start(snapshot_seconds: float) -> Service:
        service = make_mortal_service(tmp_path, worker, snapshot_seconds)
        services.append(service)
        await service.start()
        return service

    yield start
    for service in services:
        await service.close()


async def lose(worker: MortalWorker) -> None:
    """The process ends while nothing is under way; returns when the model is back."""
    before = worker.restarts
    worker.die()
    await until(lambda: worker.restarts > before)


async def test_a_run_goes_on_and_its_client_notices_nothing(
    begin: Begin, worker: MortalWorker, caplog: pytest.LogCaptureFixture
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 2)
    with caplog.at_level(logging.WARNING):
        await lose(worker)
        await train(alice, run, 2, first_seq_id=5)
    await check_state(worker, run, 4)
    said = [record.getMessage() for record in caplog.records if record.name == "twinkle.engine"]
    assert said[0] == "The model was lost (rank 0); its processes are restarted. Requests wait."
    assert said[1].startswith("The model is back after ")


async def test_what_is_queued_on_a_run_that_lost_nothing_is_computed_once_the_model_is_back(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    worker.may_restart.clear()
    worker.die()
    promises = [await alice.service.submit("alice", r) for r in (a_pass(run, 3), a_step(run, 4))]
    assert isinstance(await alice.service.retrieve("alice", promises[1].request_id, 0.05), m.TryAgain)
    alice.service.check()  # nobody is to end the engine while it recovers
    worker.may_restart.set()
    outcomes = [await alice.outcome(promise) for promise in promises]
    assert [type(outcome) for outcome in outcomes] == [ForwardBackwardOutput, m.OptimStepResponse]
    await check_state(worker, run, 2)


@pytest.mark.parametrize("seconds", [AFTER_EVERY_STEP, HARDLY_EVER])
async def test_steps_and_gradients_that_no_copy_has_are_computed_again_to_the_bit(
    begin: Begin, worker: MortalWorker, seconds: float
):
    alice = Tenant(await begin(seconds), "alice")
    run = await alice.run()
    await train(alice, run, 3)
    first = await alice.do(a_pass(run, 7))
    assert isinstance(first, ForwardBackwardOutput)
    await lose(worker)
    await lose(worker)
    assert isinstance(await alice.do(a_step(run, 8)), m.OptimStepResponse)
    await check_state(worker, run, 4)


async def test_passes_are_computed_again_in_the_calls_that_they_were_in(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    run = await alice.run()
    promises = [await alice.service.submit("alice", a_pass(run, seq_id, (seq_id, 2))) for seq_id in (3, 2, 1)]
    for promise in promises:
        await alice.outcome(promise)
    await alice.do(a_pass(run, 4))
    before = [calls_of(worker, "forward_backward")]
    await lose(worker)
    await train(alice, run, 0)
    await alice.do(a_step(run, 5))
    calls = calls_of(worker, "forward_backward")
    together, alone = [[len(rows) for rows in args[0]] for args in before[0][-2:]]
    assert (together, alone) == ([3], [1])
    again = [[len(rows) for rows in args[0]] for args in calls[len(before[0]) :]]
    assert again[-2:] == [together, alone]


async def test_a_copy_that_is_under_way_when_the_process_ends_leaves_nothing_undone(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 3)
    # The fourth step's copy never comes to be: its export ends the process.
    worker.kills = lambda method, args: method == "export_adapter" and args[0] == run and not worker.restarts
    await train(alice, run, 1, first_seq_id=7)
    await until(lambda: worker.restarts == 1)
    await train(alice, run, 1, first_seq_id=9)
    await check_state(worker, run, 5)


async def test_a_run_is_copied_when_its_time_has_come_though_nothing_is_asked_of_it(
    begin: Begin, worker: MortalWorker, tmp_path: Path
):
    alice = Tenant(await begin(0.2), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    await until((tmp_path / "runs" / run / "2.safetensors").exists)
    await lose(worker)
    await train(alice, run, 1, first_seq_id=3)
    await check_state(worker, run, 2)


async def test_a_forward_pass_alone_loses_nothing(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    await alice.do(a_pass(run, 3, forward_only=True))
    await lose(worker)
    await train(alice, run, 1, first_seq_id=4)
    await check_state(worker, run, 2)


async def test_what_is_under_way_queued_or_late_is_computed_once(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    submit = alice.service.submit
    worker.kills = lambda method, _args: method == "forward_backward" and not worker.restarts
    # 3 is under way, 4 is queued, 6 waits for 5, which arrives when 3 has been computed again.
    save = m.SaveWeightsRequest(model_id=run, seq_id=6, path="here")
    promises = [await submit("alice", request) for request in (a_pass(run, 3), a_step(run, 4), save)]
    for promise in promises[:2]:
        assert not isinstance(await alice.outcome(promise), m.Failure)
    promises.append(await submit("alice", a_pass(run, 5)))
    for promise in promises[2:]:
        assert not isinstance(await alice.outcome(promise), m.Failure)
    assert worker.restarts == 1
    await check_state(worker, run, 2)


async def test_runs_of_several_tenants_go_on(begin: Begin, worker: MortalWorker):
    service = await begin(HARDLY_EVER)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    trained, fresh = await alice.run(), await bob.run()
    await train(alice, trained, 1)
    await lose(worker)
    await train(bob, fresh, 1)
    await train(alice, trained, 1, first_seq_id=3)
    await check_state(worker, fresh, 1)
    await check_state(worker, trained, 2)


async def test_a_load_is_safe_when_it_is_done(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    run = await alice.run()
    await train(alice, run, 2)
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=5, path="here"))
    await train(alice, run, 1, first_seq_id=6)
    await lose(worker)
    load = m.LoadWeightsRequest(model_id=run, seq_id=8, path="twinkle://here", optimizer=True)
    assert isinstance(await alice.do(load), m.LoadWeightsResponse)
    await check_state(worker, run, 2)
    await lose(worker)  # what was loaded is safe without a step
    await train(alice, run, 1, first_seq_id=9)
    await check_state(worker, run, 3)


async def test_a_run_from_a_checkpoint_is_restored_to_it(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    run = await alice.run()
    await train(alice, run, 2)
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=5, path="here"))
    request = m.LoadWeightsRequest(
        path="twinkle://here", session_id=await alice.session(), model_seq_id=0, optimizer=True
    )
    resumed = (await alice.do(request)).model_id
    await lose(worker)
    await train(alice, resumed, 1)
    await check_state(worker, resumed, 3)


async def test_a_run_that_is_being_made_is_made_again(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    worker.kills = lambda method, _args: method == "add_adapter" and not worker.restarts
    run = await alice.run()
    assert worker.restarts == 1
    await train(alice, run, 1)
    await check_state(worker, run, 1)


async def test_a_request_that_ends_the_process_each_time_fails_alone(begin: Begin, worker: MortalWorker):
    service = await begin(AFTER_EVERY_STEP)
    tenants = [Tenant(service, name) for name in ("a", "b", "c")]
    runs = [await tenant.run() for tenant in tenants]
    worker.kills = lambda method, args: (
        method == "forward_backward" and any(666 in row.tokens for rows in args[0] for row in rows)
    )
    tokens = [(1, 2, 3), (666, 2, 3), (1, 2, 3)]
    promises = [
        await service.submit(tenant.name, a_pass(run, 1, tokens=some))
        for tenant, run, some in zip(tenants, runs, tokens, strict=True)
    ]
    first, bad, last = [await t.outcome(p) for t, p in zip(tenants, promises, strict=True)]
    assert worker.restarts == 2
    assert isinstance(bad, m.Failure) and "did so again" in bad.error
    assert isinstance(first, ForwardBackwardOutput) and isinstance(last, ForwardBackwardOutput)
    await train(tenants[1], runs[1], 1, first_seq_id=2)
    for tenant, run in ((tenants[0], runs[0]), (tenants[2], runs[2])):
        assert isinstance(await tenant.do(a_step(run, 2)), m.OptimStepResponse)
    for run in runs:
        await check_state(worker, run, 1)


async def test_a_sample_that_was_under_way_is_drawn_again_with_its_adapter(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    saved = await alice.do(m.SaveWeightsForSamplerRequest(model_id=run, seq_id=1, sampling_session_seq_id=0))
    sample = m.SampleRequest(
        sampling_session_id=saved.sampling_session_id, seq_id=0, prompt=ModelInput.from_ints([1])
    )
    worker.kills = lambda method, _args: method == "generate" and not worker.restarts
    outcome = await alice.do(sample)
    assert not isinstance(outcome, m.Failure)
    assert worker.restarts == 1
    await train(alice, run, 1, first_seq_id=2)


async def test_a_sample_that_ends_the_process_each_time_fails(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    made = await alice.ask(
        m.CreateSamplingSessionRequest(
            session_id=await alice.session(), sampling_session_seq_id=0, base_model=MODEL
        )
    )

    def sample(seq_id: int, token: int) -> m.SampleRequest:
        return m.SampleRequest(
            sampling_session_id=made.sampling_session_id,
            seq_id=seq_id,
            prompt=ModelInput.from_ints([token]),
        )

    worker.kills = lambda method, args: method == "generate" and 666 in args[0].prompt
    outcome = await alice.do(sample(0, 666))
    assert isinstance(outcome, m.Failure) and outcome.category == "server"
    await until(lambda: worker.restarts == 2)
    assert not isinstance(await alice.do(sample(1, 1)), m.Failure)


async def test_a_process_that_ends_while_a_run_is_put_back_is_started_once_more(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    worker.kills = lambda method, _args: method == "import_adapter" and worker.restarts == 1
    worker.die()
    await train(alice, run, 1, first_seq_id=3)
    assert worker.restarts == 2
    await check_state(worker, run, 2)


async def test_a_model_that_cannot_be_restarted_fails_the_health_check_and_what_was_under_way(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    worker.restart_fails = RuntimeError("no GPU is left")
    worker.kills = lambda method, _args: method == "forward_backward"
    outcome = await alice.do(a_pass(run, 1))
    assert isinstance(outcome, m.Failure) and "could not be restarted" in outcome.error
    with pytest.raises(RuntimeError, match="could not be restarted"):
        alice.service.check()
    # Until the engine is replaced nobody waits in vain.
    later = await alice.do(a_step(run, 2))
    assert isinstance(later, m.Failure) and "could not be restarted" in later.error


async def test_a_sample_does_not_wait_for_a_model_that_is_lost_each_time_it_is_restarted(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    session = await alice.session()
    sampler = await alice.ask(
        m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    )
    worker.kills = lambda method, _args: method == "generate"
    worker.restart_fails = WorkerLost("rank 0")
    sample = m.SampleRequest(
        sampling_session_id=sampler.sampling_session_id, seq_id=0, prompt=ModelInput.from_ints([1])
    )
    outcome = await alice.do(sample)
    assert isinstance(outcome, m.Failure) and "could not be restarted" in outcome.error


async def test_a_service_whose_model_could_not_be_restarted_closes_at_once(
    begin: Begin, worker: MortalWorker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service_module, "_STOP_SECONDS", 3600.0)
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    worker.restart_fails = RuntimeError("no GPU is left")
    worker.die()
    assert isinstance(await alice.do(a_pass(run, 1)), m.Failure)
    async with asyncio.timeout(60):
        await alice.service.close()


async def test_a_call_that_fails_as_a_whole_leaves_a_line_in_the_log(
    begin: Begin, worker: MortalWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    service = await begin(HARDLY_EVER)
    tenants = [Tenant(service, name) for name in ("a", "b")]
    runs = [await tenant.run() for tenant in tenants]
    plain = worker._backend.forward_backward

    def together_too_much(micro_batches: Any) -> Any:
        if len({row.adapter_id for rows in micro_batches for row in rows}) > 1:
            raise MemoryError("too much at once")
        return plain(micro_batches)

    monkeypatch.setattr(worker._backend, "forward_backward", together_too_much)
    promises = [await service.submit(t.name, a_pass(run, 1)) for t, run in zip(tenants, runs, strict=True)]
    for tenant, promise in zip(tenants, promises, strict=True):
        assert isinstance(await tenant.outcome(promise), ForwardBackwardOutput)
    said = [record.getMessage() for record in caplog.records if record.name == "twinkle.engine"]
    assert "a call of 2 jobs failed as a whole; it is made in parts: too much at once" in said


async def test_a_run_whose_copy_is_damaged_is_said_to_be_lost_and_others_go_on(
    begin: Begin, worker: MortalWorker, tmp_path: Path
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run, other = await alice.run(), await alice.run()
    await train(alice, other, 1)
    await train(alice, run, 1)
    copy = tmp_path / "runs" / run / "2.safetensors"
    live = alice.service.parts.live.get(run)
    assert live is not None
    await until(lambda: copy.exists() and live.snapshot.held is None)  # until then it is read from memory
    copy.write_bytes(b"not what it was")
    await lose(worker)
    for seq_id in (3, 4):
        failure = await alice.do(a_pass(run, seq_id))
        assert isinstance(failure, m.Failure) and "begin a new run from its last checkpoint" in failure.error
    await train(alice, other, 1, first_seq_id=3)
    await check_state(worker, other, 2)


async def test_what_ends_the_process_each_time_it_is_computed_again_is_given_up(
    begin: Begin, worker: MortalWorker
):
    service = await begin(HARDLY_EVER)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    run, other = await alice.run(), await bob.run()
    await alice.do(a_pass(run, 1, tokens=(666, 2, 3)))
    await train(bob, other, 1)
    worker.kills = lambda method, args: (
        method == "forward_backward" and any(666 in row.tokens for rows in args[0] for row in rows)
    )
    worker.die()
    failure = await alice.do(a_step(run, 2))
    assert isinstance(failure, m.Failure) and "begin a new run from its last checkpoint" in failure.error
    await train(bob, other, 1, first_seq_id=3)
    await check_state(worker, other, 2)


async def test_of_several_that_are_computed_again_together_only_the_one_that_ends_the_process_is_given_up(
    begin: Begin, worker: MortalWorker
):
    service = await begin(HARDLY_EVER)
    tenants = [Tenant(service, name) for name in ("a", "b", "c")]
    runs = [await tenant.run() for tenant in tenants]
    tokens = [(1, 2, 3), (666, 2, 3), (1, 2, 3)]
    promises = [
        await service.submit(tenant.name, a_pass(run, 1, tokens=some))
        for tenant, run, some in zip(tenants, runs, tokens, strict=True)
    ]
    for tenant, promise in zip(tenants, promises, strict=True):
        assert isinstance(await tenant.outcome(promise), ForwardBackwardOutput)
    worker.kills = lambda method, args: (
        method == "forward_backward" and any(666 in row.tokens for rows in args[0] for row in rows)
    )
    worker.die()
    outcomes = [await tenant.do(a_step(run, 2)) for tenant, run in zip(tenants, runs, strict=True)]
    assert [type(outcome) for outcome in outcomes] == [m.OptimStepResponse, m.Failure, m.OptimStepResponse]
    for run in (runs[0], runs[2]):
        await check_state(worker, run, 1)


async def test_what_was_computed_again_alone_is_not_computed_twice_when_the_next_ends_the_process(
    begin: Begin, worker: MortalWorker, tmp_path: Path
):
    service = await begin(AFTER_EVERY_STEP)
    tenants = [Tenant(service, name) for name in ("a", "b", "c")]
    runs = [await tenant.run() for tenant in tenants]
    for tenant, run in zip(tenants, runs, strict=True):
        await train(tenant, run, 1)
    await until(lambda: all((tmp_path / "runs" / run / "2.safetensors").exists() for run in runs))
    service.parts.snapshots.seconds = HARDLY_EVER
    promises = [
        await service.submit(tenant.name, a_pass(run, 3)) for tenant, run in zip(tenants, runs, strict=True)
    ]
    for tenant, promise in zip(tenants, promises, strict=True):
        assert isinstance(await tenant.outcome(promise), ForwardBackwardOutput)
    # The second can't be put back, so that the others are computed again alone; the third ends the process once.
    (tmp_path / "runs" / runs[1] / "2.safetensors").write_bytes(b"not what it was")
    alone: list[str] = []

    def kills(method: str, args: tuple[Any, ...]) -> bool:
        if method != "forward_backward" or worker.restarts != 1:
            return False
        alone.extend(row.adapter_id for rows in args[0] for row in rows)
        return alone[-1] == runs[2]

    worker.kills = kills
    worker.die()
    outcomes = [await tenant.do(a_step(run, 4)) for tenant, run in zip(tenants, runs, strict=True)]
    assert [type(outcome) for outcome in outcomes] == [m.OptimStepResponse, m.Failure, m.OptimStepResponse]
    assert worker.restarts == 2
    for run in (runs[0], runs[2]):
        await check_state(worker, run, 2)
