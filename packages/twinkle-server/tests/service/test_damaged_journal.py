"""A disk that changes or forgets what was written: each run is whole or says that it is lost; nobody waits for ever."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import pytest
from fake_service import Tenant
from hypothesis import given, settings
from hypothesis import strategies as st
from restarted_service import AT_ONCE, Server, stored
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Gone, NotFound, Unavailable
from twinkle.server.scheduling import live_runs
from twinkle.server.service.background import end_stuck_runs
from twinkle.server.store.journal import Journal

STEPS = 5
LOST = "is lost.*last checkpoint"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path / "server")
    server.directory.mkdir()
    yield server
    await server.close()


async def train(tenant: Tenant, run: str, first_seq_id: int) -> None:
    await tenant.do(a_pass(run, first_seq_id))
    await tenant.do(a_step(run, first_seq_id + 1))


async def three_trained_runs(server: Server) -> list[str]:
    """One after the other, so that each has records of its own in the journal; the server is killed then."""
    alice = await server.start()
    runs = [await alice.run() for _ in range(3)]
    for run in runs:
        for step in range(STEPS):
            await train(alice, run, 1 + 2 * step)
    server.kill()
    await asyncio.sleep(0)
    return runs


def segments(server: Server) -> list[Path]:
    return sorted((server.directory / "journal").glob("*.log"))


def flip(path: Path, place: bytes, at: int = 0) -> None:
    """Change four bytes of the record in which `place` comes, behind its `at`-th occurrence."""
    content = bytearray(path.read_bytes())
    start = 0
    for _ in range(at + 1):
        start = content.index(place, start + 1)
    for i in range(start + len(place) - 4, start + len(place)):
        content[i] ^= 0xFF
    path.write_bytes(content)


async def outcome(tenant: Tenant, promise: m.Promise) -> m.Result | m.Failure:
    """As a client gets it that asks again and again; two minutes pass after the first time in vain."""
    found = await tenant.service.retrieve(tenant.name, promise.request_id, timeout=0.3)
    if not isinstance(found, m.TryAgain):
        return found
    service = tenant.service
    end_stuck_runs(service.parts)
    with patch.object(live_runs, "STUCK_SECONDS", 0.0):
        end_stuck_runs(service.parts)
    found = await service.retrieve(tenant.name, promise.request_id, timeout=20)
    assert not isinstance(found, m.TryAgain), found.queue_state_reason
    return found


async def goes_on(server: Server, tenant: Tenant, run: str, steps: int = STEPS) -> bool:
    """Whether a run is what it was, to the bit, and takes its next step; else it must say that it is lost."""
    requests = [a_pass(run, 2 * steps + 1), a_step(run, 2 * steps + 2)]
    try:
        promises = [await tenant.service.submit(tenant.name, request) for request in requests]
    except (Gone, NotFound) as error:
        assert "lost" in error.message
        return False
    for promise in promises:
        found = await outcome(tenant, promise)
        if isinstance(found, m.Failure):
            assert "lost" in found.error
            with pytest.raises(Gone, match=LOST):
                await tenant.service.submit(tenant.name, a_pass(run, 2 * steps + 3))
            return False
    await check_state(server.worker, run, steps + 1)
    return True


async def test_a_run_with_a_hole_in_its_order_is_lost_and_the_others_go_on(server: Server):
    runs = await three_trained_runs(server)
    [path] = segments(server)
    flip(path, runs[1].encode(), at=5)
    alice = await server.start()
    for steps in (STEPS, STEPS + 1):
        assert [await goes_on(server, alice, run, steps) for run in (runs[0], runs[2])] == [True, True]
        with pytest.raises(Gone, match=f"{runs[1]} {LOST}"):
            await alice.service.submit("alice", a_pass(runs[1], 2 * STEPS + 1))
        with pytest.raises(Gone, match=LOST):
            await alice.ask(m.GetInfoRequest(model_id=runs[1]))
        with pytest.raises(NotFound):
            await Tenant(alice.service, "bob").ask(m.GetInfoRequest(model_id=runs[1]))
        alice = await server.kill_and_start()
    session = runs[1].rpartition(":train:")[0]
    await alice.ask(
        m.FinishSessionRequest.model_validate({"session_id": session, "reason": {"type": "success"}})
    )
    with pytest.raises(NotFound):
        await alice.ask(m.GetInfoRequest(model_id=runs[1]))


async def test_what_a_lost_run_had_queued_fails_with_the_reason_and_its_results_can_be_fetched(
    server: Server,
):
    alice = await server.start()
    run = await alice.run()
    first = await alice.service.submit("alice", a_pass(run, 1))
    await alice.outcome(first)
    await alice.do(a_step(run, 2))
    server.worker.hangs = lambda method: True
    waiting = [await alice.service.submit("alice", r) for r in (a_pass(run, 3), a_step(run, 4))]
    server.kill()
    await asyncio.sleep(0)
    [path] = segments(server)
    flip(path, waiting[0].request_id.encode())
    alice = await server.start()
    failed = await alice.outcome(waiting[1])
    assert isinstance(failed, m.Failure) and failed.category == "server" and "3 is missing" in failed.error
    with pytest.raises(NotFound, match="not known here.*damaged.*then it is lost"):
        await alice.outcome(waiting[0])
    assert not isinstance(await alice.outcome(first), m.Failure)


async def test_a_lost_run_stays_lost_when_its_segment_has_been_cleaned_away(server: Server):
    server.segment_bytes, server.seconds = 1500, AT_ONCE
    runs = await three_trained_runs(server)
    of_it_alone = [
        path
        for path in segments(server)
        if runs[1].encode() in path.read_bytes()
        and not any(r.encode() in path.read_bytes() for r in (runs[0], runs[2]))
    ]
    of_it_alone[0].unlink()
    shutil.rmtree(server.directory / "runs" / runs[1], ignore_errors=True)
    alice = await server.start()
    for seq_id in range(2 * STEPS + 1, 2 * STEPS + 40, 2):
        await train(alice, runs[0], seq_id)
    for _ in range(10):
        await alice.service.parts.compaction.clean(max_resting=0)
        await asyncio.sleep(0.02)
    journal = server.journal
    assert not set(journal.earlier) & set(journal.sealed())
    alice = await server.kill_and_start()
    with pytest.raises(Gone, match=LOST):
        await alice.service.submit("alice", a_pass(runs[1], 2 * STEPS + 1))


async def test_a_run_whose_copies_are_gone_is_not_begun_anew_in_silence(server: Server):
    """The journal has only what came behind the copy."""
    server.segment_bytes, server.seconds = 1500, AT_ONCE
    alice = await server.start()
    run = await alice.run()
    for step in range(12):
        await train(alice, run, 1 + 2 * step)
    while stored(alice, run) < 24:
        await asyncio.sleep(0.005)
    await alice.service.parts.compaction.clean(max_resting=0)
    await train(alice, run, 25)
    server.kill()
    await asyncio.sleep(0)
    shutil.rmtree(server.directory / "runs")
    alice = await server.start()
    with pytest.raises(Gone, match=LOST):
        await alice.service.submit("alice", a_pass(run, 27))


async def test_a_run_that_has_done_nothing_is_there_however_long_ago_it_was_made(server: Server):
    server.segment_bytes, server.seconds = 1500, AT_ONCE
    alice = await server.start()
    idle, busy = await alice.run(), await alice.run()
    alice.service.parts.futures._keep_seconds = 0.0
    for step in range(12):
        await train(alice, busy, 1 + 2 * step)
    while stored(alice, busy) < 24:
        await asyncio.sleep(0.005)
    before = segments(server)
    for _ in range(3):
        await alice.service.parts.compaction.clean(max_resting=0)
    assert not set(before[:-1]) & set(segments(server))
    for run, steps in ((idle, 0), (busy, 12)):
        alice = await server.kill_and_start()
        assert await goes_on(server, alice, run, steps)


async def test_an_older_copy_serves_if_the_newest_is_damaged(server: Server):
    runs = await three_trained_runs(server)
    server.seconds = AT_ONCE
    alice = await server.start()
    await train(alice, runs[0], 2 * STEPS + 1)
    folder = server.directory / "runs" / runs[0]
    newest = folder / f"{2 * STEPS + 2}.safetensors"
    while list(folder.glob("*.safetensors")) != [newest]:  # the older one is deleted behind it
        await asyncio.sleep(0.005)
    server.kill()
    await asyncio.sleep(0)
    whole = newest.read_bytes()
    damaged = bytearray(whole)
    damaged[-3] ^= 0x40
    newest.write_bytes(damaged)
    alice = await server.start()
    promise = await alice.service.submit("alice", a_pass(runs[0], 2 * STEPS + 3))
    failed = await alice.outcome(promise)
    assert isinstance(failed, m.Failure) and "checksum" in failed.error and "last checkpoint" in failed.error
    await alice.do(a_pass(runs[1], 2 * STEPS + 1))


async def test_a_request_that_was_promised_and_is_nowhere_ends_its_run_and_not_one_that_is_late(
    server: Server,
):
    """Cut off between two records, as a power cut may leave it: nothing in the journal tells."""
    alice = await server.start()
    runs = [await alice.run() for _ in range(2)]
    for run in runs:
        await train(alice, run, 1)
    [path] = segments(server)
    size = path.stat().st_size
    promised = await alice.service.submit("alice", a_pass(runs[0], 3))
    server.kill()
    await asyncio.sleep(0)
    path.write_bytes(path.read_bytes()[:size])
    alice = await server.start()
    with pytest.raises(NotFound):
        await alice.outcome(promised)
    late = [await alice.service.submit("alice", a_step(run, 4)) for run in runs]
    end_stuck_runs(alice.service.parts)
    assert not isinstance(await alice.do(a_pass(runs[1], 3)), m.Failure)
    found = await outcome(alice, late[0])
    assert isinstance(found, m.Failure) and "request 3 never arrived" in found.error
    assert not isinstance(await alice.outcome(late[1]), m.Failure)
    await check_state(server.worker, runs[1], 2)
    while runs[0] in alice.service.parts.live:
        await asyncio.sleep(0.005)
    alice = await server.kill_and_start()
    with pytest.raises(Gone, match=LOST):
        await alice.service.submit("alice", a_pass(runs[0], 5))


async def test_all_runs_that_wait_in_vain_are_ended_though_that_can_not_be_written_down(server: Server):
    alice = await server.start()
    runs = [await alice.run() for _ in range(2)]
    alice = await server.kill_and_start()
    waiting = [await alice.service.submit("alice", a_step(run, 2)) for run in runs]  # 1 never comes
    journal = server.directory / "journal"
    journal.rename(server.directory / "away")
    for promise in waiting:
        found = await outcome(alice, promise)
        assert isinstance(found, m.Failure) and "request 1 never arrived" in found.error
    (server.directory / "away").rename(journal)
    for run in runs:
        with pytest.raises(Gone, match=LOST):
            await alice.service.submit("alice", a_pass(run, 1))
        await alice.ask(m.FinishSessionRequest(session_id=run.split(":")[0]))
        assert run not in alice.service.parts.live


async def test_damage_that_is_found_while_the_server_runs_is_left_for_the_next_to_see(server: Server):
    server.segment_bytes, server.seconds = 1500, AT_ONCE
    alice = await server.start()
    run = await alice.run()
    for step in range(12):
        await train(alice, run, 1 + 2 * step)
    first = segments(server)[0]
    flip(first, run.encode(), at=1)
    for _ in range(3):
        await alice.service.parts.compaction.clean(max_resting=0)
    assert first.exists()
    assert await goes_on(server, alice, run, 12)


async def test_requests_are_refused_while_the_journal_is_away(server: Server, tmp_path: Path):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    (server.directory / "journal").rename(tmp_path / "away")
    with pytest.raises(Unavailable, match="journal is not where it was"):
        await alice.service.submit("alice", a_pass(run, 3))
    with pytest.raises(Unavailable):
        await alice.run()
    (tmp_path / "away").rename(server.directory / "journal")
    await train(alice, run, 3)
    alice = await server.kill_and_start()
    assert await goes_on(server, alice, run, 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The storage of a server that was killed, and its three runs."""
    directory = tmp_path_factory.mktemp("prepared") / "server"
    directory.mkdir()

    async def prepare() -> list[str]:
        server = Server(directory)
        server.segment_bytes = 3000
        return await three_trained_runs(server)

    return directory, asyncio.run(prepare())


@settings(max_examples=25, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["flip", "zeros", "cut", "gone"]))
def test_whatever_is_damaged_each_run_is_whole_or_says_that_it_is_lost(
    prepared: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
):
    source, runs = prepared
    directory = tmp_path_factory.mktemp("damaged") / "server"
    shutil.copytree(source, directory)
    paths = sorted((directory / "journal").glob("*.log"))
    # That the first one is not there is what it looks like when it is of no use any more.
    path = data.draw(st.sampled_from(paths[kind == "gone" :]))
    content = bytearray(path.read_bytes())
    at, size = data.draw(st.integers(0, len(content) - 1)), data.draw(st.sampled_from([1, 4, 600]))
    for i in range(at, min(at + size, len(content))):
        content[i] = 0 if kind == "zeros" else content[i] ^ 0xA5
    path.write_bytes(path.read_bytes()[:at] if kind == "cut" else content)
    if kind == "gone":
        path.unlink()

    async def go_on() -> list[bool]:
        server = Server(directory)
        alice = await server.start()
        try:
            return [await goes_on(server, alice, run) for run in runs]
        finally:
            await server.close()

    went_on = asyncio.run(go_on())
    if kind in ("flip", "zeros") and size <= 4:
        assert sum(went_on) >= 1
    shutil.rmtree(directory.parent)


def test_the_journal_of_the_prepared_server_has_several_segments(prepared: tuple[Path, list[str]]):
    journal = Journal(prepared[0] / "journal")
    assert len(journal.earlier) > 2
    assert not any(journal.examine(number).is_damaged for number in journal.earlier)
    journal.close()
