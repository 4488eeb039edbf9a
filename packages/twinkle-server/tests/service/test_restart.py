"""A service that ends, in whatever way, and another one on the same storage: clients go on as if it were the same.

An end without a word is a service whose tasks are cancelled and whose worker is never asked again; its journal is let
go of as the operating system does for a killed process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fake_service import MODEL, Tenant
from restarted_service import AT_ONCE, HARDLY_EVER, Server, stored
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Conflict, InvalidRequest, Unavailable
from twinkle.protocol.types import Datum, ForwardBackwardOutput, ModelInput
from twinkle.server.engine import compaction


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    yield server
    await server.close()


async def train(tenant: Tenant, run: str, steps: int, first_seq_id: int = 1) -> None:
    for seq_id in range(first_seq_id, first_seq_id + 2 * steps, 2):
        assert isinstance(await tenant.do(a_pass(run, seq_id)), ForwardBackwardOutput)
        assert isinstance(await tenant.do(a_step(run, seq_id + 1)), m.OptimStepResponse)


End = Callable[[Server], Awaitable[Tenant]]


async def killed(server: Server) -> Tenant:
    return await server.kill_and_start()


async def closed(server: Server) -> Tenant:
    await server.close()
    return await server.start()


ends = pytest.mark.parametrize("end", [killed, closed])


@ends
@pytest.mark.parametrize("seconds", [AT_ONCE, HARDLY_EVER])
async def test_a_run_goes_on_to_the_bit_with_its_gradient(server: Server, end: End, seconds: float):
    server.seconds = seconds
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 2)
    await alice.do(a_pass(run, 5))
    alice = await end(server)
    assert isinstance(await alice.do(a_step(run, 6)), m.OptimStepResponse)
    await check_state(server.worker, run, 3)
    alice = await end(server)
    alice = await end(server)
    await train(alice, run, 1, first_seq_id=7)
    await check_state(server.worker, run, 4)


async def test_a_closed_server_has_nothing_to_compute_again(server: Server):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 3)
    alice = await closed(server)
    await alice.do(a_step(run, 7))
    of_warm_up = 2
    assert [name for name, _ in server.worker.calls].count("forward_backward") == of_warm_up
    assert not list((server.directory / "runs" / run).glob("*.partial"))


@ends
async def test_results_can_be_fetched_and_repeated_requests_find_the_first(server: Server, end: End):
    alice = await server.start()
    run = await alice.run()
    promise = await alice.service.submit("alice", a_pass(run, 1))
    first = await alice.outcome(promise)
    await alice.do(a_step(run, 2))
    alice = await end(server)
    again = await alice.service.submit("alice", a_pass(run, 1))
    assert again.request_id == promise.request_id
    fetched = await alice.outcome(promise)
    np.testing.assert_array_equal(
        fetched.loss_fn_outputs[0]["logprobs"].array, first.loss_fn_outputs[0]["logprobs"].array
    )
    with pytest.raises(InvalidRequest, match="used before .* OptimStepRequest; the next free one is 3"):
        await alice.service.submit("alice", a_pass(run, 2))


@ends
async def test_what_is_no_repeated_request_is_refused_by_its_number(server: Server, end: End):
    """Also where the journal was written once more, without what the copies of runs have."""
    server.seconds, server.segment_bytes = AT_ONCE, 1
    alice = await server.start()
    session = await alice.session()
    create = m.CreateModelRequest(
        session_id=session, model_seq_id=0, base_model=MODEL, lora_config=m.LoraConfig(rank=2, seed=0)
    )
    run = (await alice.do(create)).model_id
    await train(alice, run, 2)
    sampler = m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    sample = m.SampleRequest(
        sampling_session_id=(await alice.ask(sampler)).sampling_session_id,
        seq_id=0,
        prompt=ModelInput.from_ints([1, 2]),
    )
    await alice.do(sample)
    repeated: list[Any] = [create, sample, a_pass(run, 1)]
    first = [await alice.service.submit("alice", request) for request in repeated]
    await server.service.parts.compaction.clean(max_resting=0)  # pyright: ignore[reportPrivateUsage]
    alice = await end(server)
    assert [await alice.service.submit("alice", request) for request in repeated] == first
    bigger = create.model_copy(update={"lora_config": m.LoraConfig(rank=4, seed=0)})
    for other, field in (
        (a_pass(run, 1, forward_only=True), "seq_id: 1"),
        (bigger, "model_seq_id: 0"),
        (sample.model_copy(update={"num_samples": 2}), "seq_id: 0"),
        (
            m.OptimStepRequest(model_id=run, seq_id=2, adam_params=m.AdamParams(learning_rate=0.5)),
            "seq_id: 2",
        ),
    ):
        with pytest.raises(Conflict, match=f"{field} was used before"):
            await alice.service.submit("alice", other)
    await train(alice, run, 1, first_seq_id=5)


async def test_what_waits_is_done_by_the_next_and_what_is_missing_may_come_late(server: Server):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    refused = a_pass(run, 4)
    with pytest.raises(InvalidRequest):
        await alice.service.submit("alice", m.ForwardBackwardRequest(run, 4, refused.data, "nonsense"))
    waiting = [await alice.service.submit("alice", request) for request in (a_pass(run, 5), a_step(run, 6))]
    alice = await server.kill_and_start()
    assert isinstance(await alice.service.retrieve("alice", waiting[0].request_id, 0.05), m.TryAgain)
    await alice.do(a_pass(run, 3, forward_only=True))
    for promise in waiting:
        assert not isinstance(await alice.outcome(promise), m.Failure)
    await check_state(server.worker, run, 2)


async def test_what_was_under_way_is_done_once(server: Server):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    server.worker.hangs = lambda method: method == "forward_backward"
    promises = [await alice.service.submit("alice", r) for r in (a_pass(run, 3), a_step(run, 4))]
    await asyncio.sleep(0.05)
    alice = await server.kill_and_start()
    for promise in promises:
        assert not isinstance(await alice.outcome(promise), m.Failure)
    await check_state(server.worker, run, 2)


async def test_a_number_that_was_passed_over_for_a_last_save_is_no_hole(server: Server):
    """As for a client that has vanished, and whose run stays since it could not be saved."""
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    await alice.service.submit("alice", a_pass(run, 4))  # 3 never comes

    save = m.SaveWeightsRequest(model_id=run, seq_id=0, path="released")
    live = server.service.parts.live
    await alice.outcome(live.enqueue_last(live.find("alice", run), save))
    alice = await server.kill_and_start()
    assert isinstance(await alice.do(a_step(run, 6)), m.OptimStepResponse)
    await check_state(server.worker, run, 2)


async def test_runs_that_ended_stay_ended_and_their_results_are_there(server: Server):
    alice = await server.start()
    run, other = await alice.run(), await alice.run()
    ended = await alice.service.submit("alice", m.UnloadModelRequest(model_id=run))
    assert await alice.outcome(ended) == m.UnloadModelResponse(model_id=run)
    alice = await server.kill_and_start()
    assert await alice.outcome(ended) == m.UnloadModelResponse(model_id=run)
    assert [run.run_id for run in alice.service.parts.live] == [other]


async def test_a_run_that_was_being_made_is_made_and_asked_for_again_is_the_same(server: Server):
    alice = await server.start()
    session = await alice.session()
    server.worker.hangs = lambda method: method == "add_adapter"
    config = m.LoraConfig.model_validate({"rank": 2})  # the server draws the seed
    create = m.CreateModelRequest(session_id=session, model_seq_id=0, base_model=MODEL, lora_config=config)
    promise = await alice.service.submit("alice", create)
    seed = next(iter(alice.service.parts.live)).spec.seed
    await asyncio.sleep(0.02)
    alice = await server.kill_and_start()
    assert (await alice.service.submit("alice", create)).request_id == promise.request_id
    run = (await alice.outcome(promise)).model_id
    assert alice.service.parts.live.find("alice", run).spec.seed == seed


async def test_a_checkpoint_that_was_being_written_is_written_with_the_state_that_it_was_to_have(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    hold = asyncio.Event()

    async def stuck(*_: Any, **__: Any) -> int:
        await hold.wait()
        return 0

    monkeypatch.setattr(alice.service.parts.checkpoints, "write", stuck)
    saved = await alice.service.submit("alice", m.SaveWeightsRequest(model_id=run, seq_id=3, path="here"))
    unnamed = m.SaveWeightsForSamplerRequest(model_id=run, seq_id=4, sampling_session_seq_id=0)
    sampler = (await alice.do(unnamed)).sampling_session_id
    await train(alice, run, 2, first_seq_id=5)
    alice = await server.kill_and_start()
    sample = m.SampleRequest(sampling_session_id=sampler, seq_id=0, prompt=ModelInput.from_ints([1]))
    assert not isinstance(await alice.do(sample), m.Failure)
    assert isinstance(await alice.outcome(saved), m.SaveWeightsResponse)
    await alice.do(a_pass(run, 9, forward_only=True))
    await check_state(server.worker, run, 3)
    load = m.LoadWeightsRequest(model_id=run, seq_id=10, path="twinkle://here", optimizer=True)
    assert isinstance(await alice.do(load), m.LoadWeightsResponse)
    await check_state(server.worker, run, 1)


async def test_a_checkpoint_that_was_written_and_not_told_of_is_no_other_ones(server: Server):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    with server.no_room_for_outcomes():
        saved = await alice.service.submit("alice", m.SaveWeightsRequest(model_id=run, seq_id=3, path="here"))
        assert isinstance(await alice.outcome(saved), m.SaveWeightsResponse)
    alice = await server.kill_and_start()
    assert isinstance(await alice.outcome(saved), m.SaveWeightsResponse)
    taken = await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=4, path="here"))
    assert isinstance(taken, m.Failure) and "already has a checkpoint" in taken.error


async def test_what_was_loaded_stays_loaded_though_the_checkpoint_goes(server: Server):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 2)
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=5, path="here"))
    await train(alice, run, 1, first_seq_id=6)
    load = m.LoadWeightsRequest(model_id=run, seq_id=8, path="twinkle://here", optimizer=True)
    await alice.do(load)
    resume = m.LoadWeightsRequest(
        path=f"twinkle://{run}/weights/here", session_id=await alice.session(), model_seq_id=0, optimizer=True
    )
    resumed = (await alice.do(resume)).model_id
    await alice.ask(m.DeleteCheckpoint(run_id=run, kind="weights", name="here"))
    alice = await server.kill_and_start()
    await train(alice, run, 1, first_seq_id=9)
    await train(alice, resumed, 1)
    await check_state(server.worker, run, 3)
    await check_state(server.worker, resumed, 3)


async def test_samples_are_drawn_by_the_next_and_asked_for_again_are_the_same(server: Server):
    alice = await server.start()
    made = await alice.ask(
        m.CreateSamplingSessionRequest(
            session_id=await alice.session(), sampling_session_seq_id=0, base_model=MODEL
        )
    )

    def sample(seq_id: int) -> m.SampleRequest:
        return m.SampleRequest(
            sampling_session_id=made.sampling_session_id, seq_id=seq_id, prompt=ModelInput.from_ints([1])
        )

    drawn = await alice.service.submit("alice", sample(0))
    first = await alice.outcome(drawn)
    server.worker.hangs = lambda method: method == "generate"
    waiting = await alice.service.submit("alice", sample(1))
    await asyncio.sleep(0.02)
    alice = await server.kill_and_start()
    assert (await alice.service.submit("alice", sample(1))).request_id == waiting.request_id
    assert (await alice.service.submit("alice", sample(0))).request_id == drawn.request_id
    assert (await alice.outcome(drawn)).sequences[0].tokens == first.sequences[0].tokens
    second = await alice.outcome(waiting)
    alice = await server.kill_and_start()  # what it drew is not drawn once more
    of_warm_up = 1
    assert [name for name, _ in server.worker.calls].count("generate") == of_warm_up
    assert (await alice.outcome(waiting)).sequences[0].tokens == second.sequences[0].tokens
    target = m.SamplingSessionTarget(sampling_session_id=made.sampling_session_id)
    ended = await alice.ask(m.RetrieveFuturesRequest(target=target, prev_cursor=0, timeout=5))
    assert {completion.request_id for completion in ended.completions} >= {drawn.request_id}


async def test_the_journal_stays_short_and_nothing_of_it_is_missed(server: Server):
    server.segment_bytes = 2_000
    server.seconds = AT_ONCE
    alice = await server.start()
    run, idle = await alice.run(), await alice.run()
    unfetched = await alice.service.submit("alice", a_pass(idle, 1))
    late = await alice.service.submit("alice", a_pass(idle, 3))
    await train(alice, run, 25)
    journal = server.journal
    async with asyncio.timeout(20):
        while len(journal.sealed()) >= 12:
            await alice.service.parts.compaction.clean(max_resting=0)
            await asyncio.sleep(0.02)
    assert journal.earlier == [] and journal.segment > 12
    alice = await server.kill_and_start()
    assert isinstance(await alice.outcome(unfetched), ForwardBackwardOutput)
    assert isinstance(await alice.do(a_step(idle, 2)), m.OptimStepResponse)
    assert isinstance(await alice.outcome(late), ForwardBackwardOutput)
    assert isinstance(await alice.do(a_step(idle, 4)), m.OptimStepResponse)
    await check_state(server.worker, idle, 2)
    await train(alice, run, 1, first_seq_id=51)
    await check_state(server.worker, run, 26)


async def test_a_full_disk_takes_nothing_more_and_goes_on_when_there_is_room(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    journal = server.journal

    def full(_frame: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write", full)
        with pytest.raises(Unavailable, match="No space left"):
            await alice.service.submit("alice", a_pass(run, 3))
        with pytest.raises(Unavailable, match="No space left"):
            await alice.run()
    await train(alice, run, 1, first_seq_id=3)
    alice = await server.kill_and_start()
    await train(alice, run, 1, first_seq_id=5)
    await check_state(server.worker, run, 3)
    assert [run.run_id for run in alice.service.parts.live] == [run]


async def test_segments_rest_until_they_are_many_or_old(server: Server, monkeypatch: pytest.MonkeyPatch):
    server.segment_bytes, server.seconds = 1_000, AT_ONCE
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 10)
    while stored(alice, run) < 20:  # the last request's copy is on the disk
        await asyncio.sleep(0.005)
    clean, sealed = server.service.parts.compaction.clean, server.journal.sealed
    before = sealed()
    await clean(max_resting=len(before))
    assert sealed() == before
    await clean(max_resting=len(before) - 2)
    assert sealed()[:1] == before[2:3]
    monkeypatch.setattr(compaction, "_REST_SECONDS", 0.0)
    await clean(max_resting=100)
    assert not set(sealed()) & set(before)


async def test_a_pass_whose_outcome_was_not_written_stays_before_its_step_however_often_the_server_ends(
    server: Server,
):
    alice = await server.start()
    run = await alice.run()
    with server.no_room_for_outcomes():
        assert isinstance(await alice.do(a_pass(run, 1)), ForwardBackwardOutput)
    assert isinstance(await alice.do(a_step(run, 2)), m.OptimStepResponse)
    for seq_id in (3, 4):
        alice = await server.kill_and_start()
        await alice.do(a_pass(run, seq_id, forward_only=True))
        await check_state(server.worker, run, 1)


async def test_of_a_run_that_is_lost_all_that_had_no_outcome_fails(server: Server):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    await server.close()  # with a snapshot behind 2
    alice = await server.start()
    with server.no_room_for_outcomes():
        passes = [await alice.service.submit("alice", a_pass(run, seq_id)) for seq_id in (3, 4)]
        for promise in passes:
            assert isinstance(await alice.outcome(promise), ForwardBackwardOutput)
    step = await alice.service.submit("alice", a_step(run, 5))
    assert isinstance(await alice.outcome(step), m.OptimStepResponse)
    (server.directory / "runs" / run / "2.safetensors").write_bytes(b"not what it was")
    alice = await server.kill_and_start()
    for promise in passes:
        outcome = await alice.outcome(promise)
        assert isinstance(outcome, m.Failure) and "begin a new run from its last checkpoint" in outcome.error
    assert isinstance(await alice.outcome(step), m.OptimStepResponse)


def too_large(run: str, seq_id: int) -> m.ForwardBackwardRequest:
    """A pass that leaves a gradient of infinities and what is no number."""
    data = {"target_tokens": [1, 2, 3], "weights": [3e38, -3e38, 3e38]}
    return m.ForwardBackwardRequest(
        run, seq_id, [Datum(ModelInput.from_ints([1, 2, 3]), data)], "cross_entropy"
    )


@ends
@pytest.mark.parametrize("seconds", [AT_ONCE, HARDLY_EVER])
async def test_a_refused_step_and_its_gradient_stay_gone(server: Server, end: End, seconds: float):
    """Whatever of it is computed again, or in a copy: the run goes on as if the passes before it had not been."""
    server.seconds = seconds
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    await alice.do(too_large(run, 3))
    alice = await end(server)
    refused = await alice.do(a_step(run, 4))
    assert isinstance(refused, m.Failure) and refused.category == "user"
    assert "the gradient is not finite" in refused.error
    await alice.do(a_pass(run, 5))
    alice = await end(server)
    assert isinstance(await alice.do(a_step(run, 6)), m.OptimStepResponse)
    await check_state(server.worker, run, 2)


async def test_of_steps_in_one_tick_only_those_that_can_not_be_made_are_refused(server: Server):
    alice = await server.start()
    runs = [await alice.run() for _ in range(3)]
    requests = [
        request
        for i, run in enumerate(runs)
        for request in (too_large(run, 1) if i == 1 else a_pass(run, 1), a_step(run, 2))
    ]
    promises = [await alice.service.submit("alice", request) for request in requests]
    outcomes = [await alice.outcome(promise) for promise in promises]
    kinds = [m.OptimStepResponse, m.Failure, m.OptimStepResponse]
    assert all(isinstance(outcome, kind) for outcome, kind in zip(outcomes[1::2], kinds, strict=True))
    await alice.do(a_pass(runs[1], 3))
    await alice.do(a_step(runs[1], 4))
    for run in runs:
        await check_state(server.worker, run, 1)


async def test_a_run_whose_weights_are_not_finite_is_not_saved(server: Server):
    alice = await server.start()
    run = await alice.run()
    backend = server.worker._backend  # no request leads there: put there by hand
    next(iter(cast("Any", backend)._adapters[run].weights.values()))[0, 0] = np.nan
    for request in (
        m.SaveWeightsRequest(model_id=run, path="a", seq_id=1),
        m.SaveWeightsForSamplerRequest(model_id=run, path="b", seq_id=2),
        m.SaveWeightsExternalRequest(model_id=run, path="c", seq_id=3),
    ):
        refused = await alice.do(request)
        assert isinstance(refused, m.Failure) and "holds nan" in refused.error, refused
