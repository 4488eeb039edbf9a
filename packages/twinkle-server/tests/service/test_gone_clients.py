"""A client that is gone keeps no sampler busy, and one that comes back has what it was promised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_service import MODEL, Tenant
from mortal_worker import MortalWorker, make_mortal_service
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.types import ModelInput, SampleResponse, SamplingParams
from twinkle.server.scheduling.leases import Leases
from twinkle.server.service.service import Service
from twinkle.server.service.session_expiry import pause_gone


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class World:
    """A service whose samples never end, and two clients with heartbeats."""

    def __init__(self, service: Service, worker: MortalWorker, clock: Clock) -> None:
        self.service, self.worker, self.clock = service, worker, clock
        self.alice, self.bob = Tenant(service, "alice"), Tenant(service, "bob")
        self.beating: list[tuple[Tenant, str]] = []

    async def sampler(self, tenant: Tenant, session: str) -> str:
        made = m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=0, base_model=MODEL)
        return (await tenant.ask(made)).sampling_session_id

    async def sample(self, tenant: Tenant, sampler: str, seq_id: int) -> m.Promise:
        request = m.SampleRequest(
            sampling_session_id=sampler,
            seq_id=seq_id,
            prompt=ModelInput.from_ints([1]),
            sampling_params=SamplingParams(max_tokens=3, seed=seq_id),
        )
        return await self.service.submit(tenant.name, request)

    async def seconds(self, seconds: float) -> None:
        for _ in range(int(seconds / 5)):
            self.clock.now += 5
            for tenant, session in self.beating:
                await tenant.ask(m.SessionHeartbeatRequest(session_id=session))
            pause_gone(self.service.parts)
            await asyncio.sleep(0)

    def drawing(self) -> int:
        return sum(sample.task is not None for sample in self.service.parts.samples._samples.values())


@pytest.fixture
async def world(tmp_path: Path, clock: Clock) -> AsyncIterator[World]:
    worker = MortalWorker()
    parts = make_mortal_service(tmp_path, worker, 3600.0).parts
    service = Service(replace(parts, leases=Leases(25, clock)))
    await service.start()
    worker.hangs = lambda method: method == "generate"
    yield World(service, worker, clock)
    worker.hangs = lambda _method: False
    await service.close()


async def test_the_samples_of_a_gone_client_are_stopped_and_drawn_again_when_it_is_back(world: World):
    sessions = [await tenant.session() for tenant in (world.alice, world.bob)]
    samplers = [
        await world.sampler(tenant, s) for tenant, s in zip((world.alice, world.bob), sessions, strict=True)
    ]
    world.beating = [(world.alice, sessions[0]), (world.bob, sessions[1])]
    await world.seconds(60)
    promises = [await world.sample(world.alice, samplers[0], seq_id) for seq_id in range(8)]
    await world.sample(world.bob, samplers[1], 0)
    await world.seconds(60)
    assert world.drawing() == 9
    del world.beating[0]
    await world.seconds(30)
    assert world.drawing() == 1, "the other client's goes on"
    await asyncio.sleep(0.01)
    world.worker.hangs = lambda _method: False
    world.beating.append((world.alice, sessions[0]))
    await world.seconds(5)
    drawn = [await world.alice.outcome(promise) for promise in promises]
    alone = await world.alice.outcome(await world.sample(world.alice, samplers[0], 100))
    assert all(isinstance(outcome, SampleResponse) for outcome in [*drawn, alone])


async def test_a_client_that_asks_for_its_result_again_gets_it(world: World):
    sampler = await world.sampler(world.alice, await world.alice.session())
    promise = await world.sample(world.alice, sampler, 0)
    pending = await world.service.retrieve("alice", promise.request_id, timeout=0.01)
    assert isinstance(pending, m.TryAgain)
    await world.seconds(200)
    assert world.drawing() == 0
    # As a client does that doesn't know whether it arrived.
    again = await world.sample(world.alice, sampler, 0)
    pause_gone(world.service.parts)
    assert again.request_id == promise.request_id and world.drawing() == 1
    world.worker.hangs = lambda _method: False
    await world.service.retrieve("alice", promise.request_id, timeout=0.01)
    await world.seconds(100)
    assert world.drawing() == 0
    assert isinstance(await world.alice.outcome(promise), SampleResponse)


async def test_one_that_is_stopped_and_goes_on_at_once_is_not_said_to_have_failed(world: World):
    session = await world.alice.session()
    sampler = await world.sampler(world.alice, session)
    promise = await world.sample(world.alice, sampler, 0)
    await asyncio.sleep(0)
    world.service.parts.samples.pause(session)
    world.service.parts.samples.resume(session)
    world.worker.hangs = lambda _method: False
    await asyncio.sleep(0.01)
    world.service.parts.samples.pause(session)
    world.service.parts.samples.resume(session)
    assert isinstance(await world.alice.outcome(promise), SampleResponse)
    target = m.SamplingSessionTarget(sampling_session_id=sampler)
    ended = await world.alice.ask(m.RetrieveFuturesRequest(target=target, prev_cursor=0, timeout=5))
    assert [completion.state for completion in ended.completions] == ["finished"]


async def test_one_that_is_cancelled_before_it_has_begun_is_said_to_have_ended(world: World):
    session = await world.alice.session()
    sampler = await world.sampler(world.alice, session)
    promise = await world.sample(world.alice, sampler, 0)
    await world.alice.ask(m.CancelFutureRequest(request_id=promise.request_id))
    target = m.SamplingSessionTarget(sampling_session_id=sampler)
    ended = await world.alice.ask(m.RetrieveFuturesRequest(target=target, prev_cursor=0, timeout=5))
    assert [completion.state for completion in ended.completions] == ["failed"]


async def test_one_that_never_comes_back_is_told_why_and_counts_no_more(world: World):
    session = await world.alice.session()
    world.beating = [(world.alice, session)]
    promise = await world.sample(world.alice, await world.sampler(world.alice, session), 0)
    await world.seconds(10)
    world.beating = []
    await world.seconds(890)
    assert world.service.parts.futures.load_of("alice").requests == 1
    await world.seconds(10)
    assert world.service.parts.futures.load_of("alice").requests == 0
    failed = await world.alice.outcome(promise)
    assert isinstance(failed, m.Failure) and failed.category == "server"
    assert "quarter of an hour; send the request again" in failed.error


async def test_who_waits_for_the_samples_of_others_is_heard_of(world: World):
    """A sampling client that was handed to another process, while the one that made it has ended."""
    session = await world.alice.session()
    sampler = await world.sampler(world.alice, session)
    await world.alice.ask(m.SessionHeartbeatRequest(session_id=session))
    await world.sample(world.alice, sampler, 0)
    target = m.SamplingSessionTarget(sampling_session_id=sampler)
    waiting = asyncio.create_task(
        world.alice.ask(m.RetrieveFuturesRequest(target=target, prev_cursor=0, timeout=20))
    )
    await world.seconds(300)
    assert world.drawing() == 1
    waiting.cancel()  # as the gateway does when its client has hung up
    await world.seconds(30)
    assert world.drawing() == 0


async def test_another_tenants_question_keeps_nothing_alive(world: World):
    session = await world.alice.session()
    await world.alice.ask(m.SessionHeartbeatRequest(session_id=session))
    promise = await world.sample(world.alice, await world.sampler(world.alice, session), 0)
    for _ in range(6):
        with pytest.raises(Exception, match="not known here"):
            await world.service.retrieve("bob", promise.request_id, timeout=0)
        await world.seconds(5)
    assert world.drawing() == 0


async def test_what_was_accepted_on_a_run_is_done_though_its_client_is_gone(world: World):
    run = await world.alice.run()
    session = run.split(":")[0]
    await world.alice.ask(m.SessionHeartbeatRequest(session_id=session))
    waiting = await world.service.submit("alice", a_step(run, 2))
    await world.seconds(2000)
    await world.service.submit("alice", a_pass(run, 1))
    assert isinstance(await world.alice.outcome(waiting), m.OptimStepResponse)
    await check_state(world.worker, run, 1)


async def test_a_client_that_trains_again_is_back_and_its_samples_are_drawn(world: World):
    run = await world.alice.run()
    session = run.partition(":")[0]
    await world.sample(world.alice, await world.sampler(world.alice, session), 0)
    await world.seconds(200)
    assert world.drawing() == 0
    await world.service.submit("alice", m.OptimStepRequest(model_id=run, seq_id=1))
    await world.seconds(5)
    assert world.drawing() == 1
