"""A lost process of the model, through the service's own face: what is restored, and what clients are told."""

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

from twinkle.protocol import messages as m
from twinkle.protocol.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    ModelConfig,
    OptimizerState,
    Row,
)
from twinkle.server.service.service import Service

AFTER_EVERY_STEP, HARDLY_EVER = 0.0, 3600.0
TOKENS = np.array([1, 2, 3])


def a_pass(run: str, seq_id: int, tokens: tuple[int, ...] = (1, 2, 3), **more: Any):
    data = {"target_tokens": list(tokens), "weights": [1.0] * len(tokens)}
    return m.ForwardBackwardRequest(
        run, seq_id, [Datum(ModelInput.from_ints(list(tokens)), data)], "cross_entropy", **more
    )


def a_step(run: str, seq_id: int) -> m.OptimStepRequest:
    return m.OptimStepRequest(model_id=run, seq_id=seq_id, adam_params=AdamParams(learning_rate=0.1))


def expected_state(steps: int) -> AdapterState:
    """What an undisturbed backend has after so many steps of a run as `Tenant.run` makes it."""
    backend = FakeBackend(ModelConfig(Path("fake")))
    backend.add_adapter("a", AdapterSpec(rank=2, seed=0))
    row = Row("a", TOKENS, "cross_entropy", {"target_tokens": TOKENS, "weights": np.ones(3, np.float32)})
    for _ in range(steps):
        backend.forward_backward([[row]])
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.1))])
    return backend.export_adapter("a", with_optimizer=True, with_gradients=True)


async def check_state(worker: MortalWorker, run: str, steps: int) -> None:
    """Weights and moments on the worker are exactly those of `steps` undisturbed steps."""
    state, expected = await worker.export_adapter(run, with_optimizer=True), expected_state(steps)
    assert isinstance(state.optimizer, OptimizerState) and isinstance(expected.optimizer, OptimizerState)
    assert state.optimizer.step == expected.optimizer.step == steps
    for mine, theirs in (
        (state.weights, expected.weights),
        (state.optimizer.exp_avg, expected.optimizer.exp_avg),
        (state.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq),
    ):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(mine[name], theirs[name])


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


async def test_a_run_that_lost_nothing_goes_on_and_its_client_notices_nothing(
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
    assert said[0] == "A process of the model ended (rank 0): starting it anew. Requests wait."
    assert said[1].startswith("The model is back after ")
    assert said[1].endswith("1 run restored, 0 of them set back.")


async def test_what_is_queued_on_a_run_that_lost_nothing_is_computed_once_the_model_is_back(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    worker.may_restart.clear()
    worker.die()
    promises = [await alice.service.submit("alice", r) for r in (a_pass(run, 3), a_step(run, 4))]
    assert isinstance(await alice.service.retrieve("alice", promises[1].request_id, 0.05), m.Pending)
    alice.service.check()  # nobody is to end the engine while it recovers
    worker.may_restart.set()
    outcomes = [await alice.outcome(promise) for promise in promises]
    assert [type(outcome) for outcome in outcomes] == [ForwardBackwardOutput, m.OptimStepResponse]
    await check_state(worker, run, 2)


async def test_an_idle_loss_is_told_with_the_next_request_once_and_training_goes_on_from_the_snapshot(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    run = await alice.run()
    await train(alice, run, 2)
    await lose(worker)
    failure = await alice.do(a_pass(run, 5))
    assert isinstance(failure, m.Failure) and failure.category == "server"
    assert "set back to its state before its first optimizer step (of 2)" in failure.error
    await train(alice, run, 3, first_seq_id=6)
    await check_state(worker, run, 3)


async def test_a_run_is_set_back_to_its_latest_snapshot_and_told_how_far(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 3)
    # The fourth step's copy never comes to be: its export ends the process.
    worker.kills = lambda method, args: method == "export_adapter" and args[0] == run and not worker.restarts
    await alice.do(a_pass(run, 7))
    await alice.do(a_step(run, 8))
    await until(lambda: worker.restarts == 1)
    failure = await alice.do(a_step(run, 9))
    assert isinstance(failure, m.Failure)
    assert "set back to its state after optimizer step 3 (of 4)" in failure.error
    await check_state(worker, run, 3)
    await train(alice, run, 1, first_seq_id=10)
    await check_state(worker, run, 4)


async def test_a_run_is_copied_when_its_time_has_come_though_nothing_is_asked_of_it(
    begin: Begin, worker: MortalWorker, tmp_path: Path
):
    alice = Tenant(await begin(0.2), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    await until((tmp_path / "snapshots" / run / "weights" / "0").exists)
    await lose(worker)
    await train(alice, run, 1, first_seq_id=3)
    await check_state(worker, run, 2)


async def test_a_gradient_that_no_step_had_applied_is_lost_and_said_to_be(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    await alice.do(a_pass(run, 3))
    await lose(worker)
    failure = await alice.do(a_step(run, 4))
    assert isinstance(failure, m.Failure)
    assert "set back to its state after optimizer step 1, and what came after that is lost" in failure.error
    await lose(worker)  # once more, and this time there was nothing to lose
    await train(alice, run, 1, first_seq_id=5)
    await check_state(worker, run, 2)


async def test_a_forward_pass_alone_loses_nothing(begin: Begin, worker: MortalWorker):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    await alice.do(a_pass(run, 3, forward_only=True))
    await lose(worker)
    await train(alice, run, 1, first_seq_id=4)
    await check_state(worker, run, 2)


async def test_all_that_was_sent_in_the_belief_of_the_lost_state_fails_and_what_comes_late_of_it_too(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(HARDLY_EVER), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    submit = alice.service.submit
    worker.kills = lambda method, _args: method == "forward_backward" and not worker.restarts
    # 3 is under way, 4 is queued, 6 waits for 5, which arrives when 3 has failed.
    promises = [
        await submit("alice", r)
        for r in (a_pass(run, 3), a_step(run, 4), m.SaveWeightsRequest(model_id=run, seq_id=6, path="no"))
    ]
    first, second = [await alice.outcome(promise) for promise in promises[:2]]
    promises.append(await submit("alice", a_pass(run, 5)))
    told = await alice.do(a_pass(run, 7))
    outcomes = [first, second, *[await alice.outcome(promise) for promise in promises[2:]]]
    assert [type(outcome) for outcome in outcomes] == [m.Failure] * 4
    assert len({outcome.error for outcome in outcomes}) == 1
    assert isinstance(told, ForwardBackwardOutput)
    assert (await alice.ask(m.ListCheckpoints(run_id=run))).checkpoints == []
    await alice.do(a_step(run, 8))
    await check_state(worker, run, 1)


async def test_each_tenant_is_told_of_its_own_run_alone(begin: Begin, worker: MortalWorker):
    service = await begin(HARDLY_EVER)
    alice, bob = Tenant(service, "alice"), Tenant(service, "bob")
    trained, fresh = await alice.run(), await bob.run()
    await train(alice, trained, 1)
    await lose(worker)
    assert isinstance(await alice.do(a_pass(trained, 3)), m.Failure)
    await train(bob, fresh, 1)
    await check_state(worker, fresh, 1)


async def test_a_load_sets_the_state_itself_so_it_is_done_and_ends_the_matter(
    begin: Begin, worker: MortalWorker
):
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
    assert isinstance(bad, m.Failure) and "ended again" in bad.error
    assert isinstance(first, ForwardBackwardOutput) and isinstance(last, ForwardBackwardOutput)
    # The first had its gradient when the process ended the second time.
    told = await tenants[0].do(a_step(runs[0], 2))
    assert isinstance(told, m.Failure) and "set back" in told.error
    for tenant, run, seq_id in ((tenants[1], runs[1], 2), (tenants[0], runs[0], 3)):
        await train(tenant, run, 1, first_seq_id=seq_id)
        await check_state(worker, run, 1)
    assert isinstance(await tenants[2].do(a_step(runs[2], 2)), m.OptimStepResponse)
    await check_state(worker, runs[2], 1)


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


async def test_a_process_that_ends_while_runs_are_put_back_is_started_once_more(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    worker.kills = lambda method, _args: method == "import_adapter" and worker.restarts == 1
    worker.die()
    await until(lambda: worker.restarts == 2)
    await train(alice, run, 1, first_seq_id=3)
    await check_state(worker, run, 2)


async def test_a_model_that_cannot_be_started_anew_fails_the_health_check_and_what_was_under_way(
    begin: Begin, worker: MortalWorker
):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    worker.restart_fails = RuntimeError("no GPU is left")
    worker.kills = lambda method, _args: method == "forward_backward"
    outcome = await alice.do(a_pass(run, 1))
    assert isinstance(outcome, m.Failure) and "could not be started anew" in outcome.error
    with pytest.raises(RuntimeError, match="could not be started anew"):
        alice.service.check()
    # Until the engine is replaced nobody waits in vain.
    later = await alice.do(a_step(run, 2))
    assert isinstance(later, m.Failure) and "could not be started anew" in later.error


async def test_a_damaged_snapshot_is_said_to_be(begin: Begin, worker: MortalWorker, tmp_path: Path):
    alice = Tenant(await begin(AFTER_EVERY_STEP), "alice")
    run = await alice.run()
    await train(alice, run, 1)
    directory = tmp_path / "snapshots" / run / "weights"
    await until(lambda: (directory / "0" / "manifest.json").exists())
    [weights] = directory.glob("*/adapter_model.safetensors")
    weights.write_bytes(b"not what it was")
    await lose(worker)
    failure = await alice.do(a_pass(run, 3))
    assert (
        isinstance(failure, m.Failure) and "a new adapter, since its snapshot can't be read" in failure.error
    )
    await train(alice, run, 1, first_seq_id=4)
    await check_state(worker, run, 1)
