"""A machine's clock that leaps while a server runs, and between two."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_service import Tenant
from restarted_service import Server
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import ModelInput
from twinkle.server.checkpoints import checkpoints
from twinkle.server.store.clock import STEADY_SECONDS, SteadyClock

YEAR, DAY = 365 * 86_400.0, 86_400.0

leaps = pytest.mark.parametrize("leap", [YEAR, -DAY])


class WallClock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """In place of `time.time`; it moves when it is told to."""
    wall = WallClock()
    monkeypatch.setattr(time, "time", wall)
    return wall


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    yield server
    await server.close()


async def saved(tenant: Tenant, run: str, seq_id: int, **more: object) -> str:
    return (await tenant.do(m.SaveWeightsRequest(model_id=run, seq_id=seq_id, **more))).path  # pyright: ignore


async def train(tenant: Tenant, run: str, first_seq_id: int) -> None:
    for request in (a_pass(run, first_seq_id), a_step(run, first_seq_id + 1)):
        assert not isinstance(await tenant.do(request), m.Failure)


@leaps
async def test_what_is_under_way_is_done_once(server: Server, wall: WallClock, leap: float):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    fetched_late = await alice.service.submit("alice", a_pass(run, 3))
    wall.now += leap
    waiting = await alice.service.submit("alice", a_step(run, 4))
    assert not isinstance(await alice.outcome(waiting), m.Failure)
    assert not isinstance(await alice.outcome(fetched_late), m.Failure)
    wall.now -= leap
    assert not isinstance(await alice.outcome(fetched_late), m.Failure), "a reply can be lost"
    await train(alice, run, 5)
    await check_state(server.worker, run, 3)


@leaps
async def test_what_was_accepted_is_done_once_by_the_next_server(
    server: Server, wall: WallClock, leap: float
):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    unfetched = await alice.service.submit("alice", a_pass(run, 3))
    waiting = await alice.service.submit("alice", a_step(run, 5))  # its predecessor comes after the leap
    server.kill()
    wall.now += leap
    alice = await server.start()
    assert (await alice.service.submit("alice", a_pass(run, 3))).request_id == unfetched.request_id
    assert not isinstance(await alice.outcome(unfetched), m.Failure)
    assert not isinstance(await alice.do(a_pass(run, 4, forward_only=True)), m.Failure)
    assert not isinstance(await alice.outcome(waiting), m.Failure)
    await check_state(server.worker, run, 2)


@leaps
async def test_the_checkpoint_of_a_name_is_the_one_that_was_saved_last(
    server: Server, wall: WallClock, leap: float
):
    alice = await server.start()
    first, second, third = await alice.run(), await alice.run(), await alice.run()
    await saved(alice, first, 1, path="name")
    wall.now += leap
    path = await saved(alice, second, 1, path="name")
    session = await alice.session()
    sampler = m.CreateSamplingSessionRequest(
        session_id=session, sampling_session_seq_id=0, model_path="twinkle://name"
    )
    sampler_id = (await alice.ask(sampler)).sampling_session_id
    assert (await alice.ask(m.GetSampler(sampler_id=sampler_id))).model_path == path
    wall.now -= leap
    path = await saved(alice, third, 1, path="name")
    listed = (await alice.ask(m.ListUserCheckpoints())).checkpoints
    assert [entry.tinker_path.split("/")[2] for entry in listed] == [third, second, first]
    loaded = await alice.do(m.LoadWeightsRequest(model_id=first, seq_id=2, path="twinkle://name"))
    assert loaded.path == path


async def test_what_is_overwritten_within_one_tick_of_the_clock_is_another(server: Server, wall: WallClock):
    alice = await server.start()
    run = await alice.run()
    await saved(alice, run, 1, path="again")
    sampler = m.CreateSamplingSessionRequest(
        session_id=await alice.session(), sampling_session_seq_id=0, model_path="twinkle://again"
    )
    sampler_id = (await alice.ask(sampler)).sampling_session_id
    await saved(alice, run, 2, path="again", overwrite=True)
    sample = m.SampleRequest(sampling_session_id=sampler_id, seq_id=0, prompt=ModelInput.from_ints([1]))
    failure = await alice.do(sample)
    assert isinstance(failure, m.Failure) and "was overwritten" in failure.error


async def test_a_leap_deletes_nothing_that_time_has_not_ended(
    server: Server, wall: WallClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    ran = 0.0
    monkeypatch.setattr(checkpoints, "SteadyClock", lambda: SteadyClock(wall, lambda: ran))
    alice = await server.start()
    run = await alice.run()
    keeper = server.service.parts.checkpoints

    async def pass_time(seconds: float) -> None:
        nonlocal ran
        ran, wall.now = ran + seconds, wall.now + seconds
        await keeper.sweep()

    await pass_time(STEADY_SECONDS)
    path = await saved(alice, run, 1, path="brief", ttl_seconds=int(2 * DAY))
    files = server.directory / "checkpoints" / run / "weights" / "brief"
    wall.now += YEAR
    for _ in range(5):
        await pass_time(60)
    with pytest.raises(NotFound):
        await alice.ask(m.WeightsInfoRequest(tinker_path=path))
    wall.now -= YEAR
    await pass_time(60)
    assert await alice.ask(m.WeightsInfoRequest(tinker_path=path))
    assert files.is_dir()
    assert len([record for record in caplog.records if "clock has leapt" in record.getMessage()]) == 2
    wall.now += YEAR
    taken = await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=2, path="brief"))
    assert isinstance(taken, m.Failure) and "already has a checkpoint" in taken.error
    wall.now -= YEAR
    await pass_time(60)
    await pass_time(2 * DAY)
    assert not files.exists(), "its time is over indeed"


@leaps
async def test_a_server_that_has_just_been_started_deletes_nothing_yet(
    server: Server, wall: WallClock, monkeypatch: pytest.MonkeyPatch, leap: float
):
    alice = await server.start()
    run = await alice.run()
    path = await saved(alice, run, 1, path="brief", ttl_seconds=3600)
    await server.close()
    wall.now += leap
    monkeypatch.setattr(checkpoints, "SteadyClock", lambda: SteadyClock(wall))
    alice = await server.start()
    await server.service.parts.checkpoints.sweep()
    wall.now -= leap
    assert await alice.ask(m.WeightsInfoRequest(tinker_path=path))
