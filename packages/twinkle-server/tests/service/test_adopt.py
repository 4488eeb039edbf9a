"""An engine that has ended, in whatever way, and another one that takes over its runs while it works: clients go on as
if it were the same.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from fake_service import MODEL, Tenant
from restarted_service import AT_ONCE, HARDLY_EVER, Server
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, ServerFault, Unavailable
from twinkle.protocol.types import ForwardBackwardOutput, ModelInput, SampleResponse
from twinkle.server.store import journal as journals


@pytest.fixture
async def engines(tmp_path: Path) -> AsyncIterator[tuple[Server, Server]]:
    """Two engines of a server, which share a database."""
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    one, two = (Server(tmp_path / name, url, name) for name in ("e1", "e2"))
    for engine in (one, two):
        engine.directory.mkdir()
    yield one, two
    await one.close()
    await two.close()


async def train(tenant: Tenant, run: str, steps: int, first_seq_id: int = 1) -> None:
    for seq_id in range(first_seq_id, first_seq_id + 2 * steps, 2):
        assert isinstance(await tenant.do(a_pass(run, seq_id)), ForwardBackwardOutput)
        assert isinstance(await tenant.do(a_step(run, seq_id + 1)), m.OptimStepResponse)


async def end(engine: Server, is_killed: bool) -> None:
    if is_killed:
        # Only its own tasks: the other engine of this process works on.
        service = engine.service
        service.parts.run_log.journal = None
        await engine.service.close()
        engine.journal.close()
        engine._service = None  # pyright: ignore[reportPrivateUsage]
    else:
        await engine.close()


ends = pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "closed"])


@ends
@pytest.mark.parametrize("seconds", [AT_ONCE, HARDLY_EVER])
async def test_a_run_goes_on_to_the_bit_beside_those_that_the_engine_has(
    engines: tuple[Server, Server], is_killed: bool, seconds: float
):
    one, two = engines
    one.seconds = two.seconds = seconds
    alice, bob = await one.start(), await two.start()
    moved, own = await alice.run(), await bob.run()
    await train(alice, moved, 2)
    await alice.do(a_pass(moved, 5))
    await end(one, is_killed)
    busy = asyncio.create_task(train(bob, own, 20))
    assert await two.service.adopt(one.directory) == 1
    alice = Tenant(two.service, "alice")
    assert isinstance(await alice.do(a_step(moved, 6)), m.OptimStepResponse)
    await check_state(two.worker, moved, 3)
    await busy
    await check_state(two.worker, own, 20)
    assert not one.directory.exists()
    # What it took over is its own: it is killed, and another process goes on.
    alice = await two.kill_and_start()
    await train(alice, moved, 1, first_seq_id=7)
    await train(alice, own, 1, first_seq_id=41)
    await check_state(two.worker, moved, 4)
    await check_state(two.worker, own, 21)


@ends
async def test_requests_results_and_samples_move_with_the_runs(
    engines: tuple[Server, Server], is_killed: bool
):
    one, two = engines
    alice = await one.start()
    run = await alice.run()
    first = await alice.service.submit("alice", a_pass(run, 1))
    assert first.request_id.endswith(".e1")
    outcome = await alice.outcome(first)
    await alice.do(a_step(run, 2))
    session = await alice.session()
    sampler = m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    sampler_id = (await alice.ask(sampler)).sampling_session_id
    one.worker.hangs = lambda verb: verb in ("forward_backward", "generate")
    waiting = await alice.service.submit("alice", a_pass(run, 3))
    sample = m.SampleRequest(sampling_session_id=sampler_id, seq_id=0, prompt=ModelInput.from_ints([1, 2]))
    drawing = await alice.service.submit("alice", sample)
    await asyncio.sleep(0.05)
    with patch("twinkle.server.service.service._STOP_SECONDS", 0.1):
        await end(one, is_killed)
    await two.start()
    await two.service.adopt(one.directory)
    alice = Tenant(two.service, "alice")
    again = await alice.service.submit("alice", a_pass(run, 1))
    assert again.request_id == first.request_id
    np.testing.assert_array_equal(
        (await alice.outcome(first)).loss_fn_outputs[0]["logprobs"].array,
        outcome.loss_fn_outputs[0]["logprobs"].array,
    )
    with pytest.raises(InvalidRequest, match="used before"):
        await alice.service.submit("alice", a_pass(run, 2))
    assert isinstance(await alice.outcome(waiting), ForwardBackwardOutput)
    assert isinstance(await alice.outcome(drawing), SampleResponse)
    assert (await alice.service.submit("alice", sample)).request_id == drawing.request_id
    await alice.do(a_step(run, 4))
    await check_state(two.worker, run, 2)


async def test_an_engine_killed_while_it_takes_over_does_so_again_and_doubles_nothing(
    engines: tuple[Server, Server],
):
    one, two = engines
    alice = await one.start()
    await two.start()
    run = await alice.run()
    await train(alice, run, 2)
    await end(one, is_killed=True)
    kept = one.directory.with_name("kept")
    shutil.copytree(one.directory, kept)
    assert await two.service.adopt(one.directory) == 1
    await two.kill_and_start()
    # As if the first process had been killed before it deleted the other's directory.
    shutil.copytree(kept, one.directory)
    assert await two.service.adopt(one.directory) == 0
    alice = Tenant(two.service, "alice")
    await train(alice, run, 1, first_seq_id=5)
    await check_state(two.worker, run, 3)
    alice = await two.kill_and_start()
    await train(alice, run, 1, first_seq_id=7)
    await check_state(two.worker, run, 4)


async def test_nothing_is_taken_over_while_the_journal_has_no_room(engines: tuple[Server, Server]):
    one, two = engines
    alice = await one.start()
    await two.start()
    run = await alice.run()
    await train(alice, run, 1)
    await end(one, is_killed=True)
    full = Unavailable("no room")
    with patch.object(two.journal, "add_segment", side_effect=full), pytest.raises(Unavailable):
        await two.service.adopt(one.directory)
    assert two.service.parts.live.get(run) is None
    assert await two.service.adopt(one.directory) == 1
    await train(Tenant(two.service, "alice"), run, 1, first_seq_id=3)
    await check_state(two.worker, run, 2)


async def test_an_engine_that_works_is_not_taken_over(
    engines: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
):
    one, two = engines
    alice = await one.start()
    await two.start()
    run = await alice.run()
    monkeypatch.setattr(journals, "_LOCK_SECONDS", 0.1)
    with pytest.raises(ServerFault, match="another server has .* in use"):
        await two.service.adopt(one.directory)
    await train(alice, run, 1)


async def test_lost_runs_stay_lost(engines: tuple[Server, Server]):
    one, two = engines
    alice = await one.start()
    await two.start()
    run = await alice.run()
    live = one.service.parts.live.find("alice", run)
    one.service.parts.live.lose(live, "model_id: it was lost")
    await end(one, is_killed=True)
    await two.service.adopt(one.directory)
    for _ in range(2):
        with pytest.raises(Exception, match="it was lost"):
            await two.service.submit("alice", a_pass(run, 1))
        await two.kill_and_start()
