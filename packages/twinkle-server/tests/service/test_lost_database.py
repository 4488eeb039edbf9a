"""What goes on, what waits and what is refused while the database's file is away or damaged."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_service import Tenant
from restarted_service import Server
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Unavailable
from twinkle.server.checkpoints import checkpoints
from twinkle.server.store import retry
from twinkle.server.store.clock import STEADY_SECONDS, SteadyClock


@pytest.fixture(autouse=True)
def _short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.01)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    yield server
    await server.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.sqlite"


@pytest.fixture
def away(tmp_path: Path) -> Path:
    return tmp_path / "away.sqlite"


async def train(tenant: Tenant, run: str, first_seq_id: int) -> None:
    for request in (a_pass(run, first_seq_id), a_step(run, first_seq_id + 1)):
        assert not isinstance(await tenant.do(request), m.Failure)


def steady_clock() -> SteadyClock:
    now = 0.0
    clock = SteadyClock(lambda: now, lambda: now)
    now = STEADY_SECONDS
    return clock


def session_of(run: str) -> str:
    return run.split(":")[0]


async def test_training_goes_on_without_it_and_the_rest_when_it_is_back(
    server: Server,
    path: Path,
    away: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(checkpoints, "SteadyClock", steady_clock)
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    path.rename(away)
    await train(alice, run, 3)
    for _ in range(2):
        with pytest.raises(Unavailable, match="not where it was: nothing was changed"):
            await alice.ask(m.SessionHeartbeatRequest(session_id=session_of(run)))
        with pytest.raises(Unavailable):
            await alice.run()
    await server.service.parts.checkpoints.sweep()
    assert [record.levelname for record in caplog.records] == ["ERROR"], "it is said once"
    promise = await alice.service.submit("alice", m.SaveWeightsRequest(model_id=run, seq_id=5, path="name"))
    assert isinstance(await alice.service.retrieve("alice", promise.request_id, 0.1), m.TryAgain)
    away.rename(path)
    saved = await alice.outcome(promise)
    assert isinstance(saved, m.SaveWeightsResponse)
    assert await alice.ask(m.WeightsInfoRequest(tinker_path=saved.path))
    await train(alice, run, 6)
    await check_state(server.worker, run, 3)


async def test_what_was_accepted_without_it_outlives_a_kill(server: Server, path: Path, away: Path):
    alice = await server.start()
    run = await alice.run()
    path.rename(away)
    await train(alice, run, 1)
    promise = await alice.service.submit("alice", m.SaveWeightsRequest(model_id=run, seq_id=3, path="name"))
    await asyncio.sleep(0.05)
    server.kill()
    away.rename(path)
    await asyncio.sleep(0)
    alice = await server.start()
    assert isinstance(await alice.outcome(promise), m.SaveWeightsResponse)
    await alice.ask(m.SessionHeartbeatRequest(session_id=session_of(run)))
    await train(alice, run, 4)
    await check_state(server.worker, run, 2)


async def test_runs_go_on_with_a_server_that_starts_on_the_copy(server: Server, path: Path):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=3, path="name"))
    path.unlink()
    with pytest.raises(Unavailable):
        await alice.ask(m.SessionHeartbeatRequest(session_id=session_of(run)))
    await train(alice, run, 4)
    [copy] = path.parent.glob("test.sqlite.rescued-*")
    server.kill()
    copy.rename(path)
    await asyncio.sleep(0)
    alice = await server.start()
    await alice.ask(m.SessionHeartbeatRequest(session_id=session_of(run)))
    assert await alice.ask(m.WeightsInfoRequest(tinker_path="twinkle://name"))
    await train(alice, run, 6)
    await check_state(server.worker, run, 3)


async def test_training_goes_on_while_it_is_damaged(server: Server, path: Path):
    alice = await server.start()
    run = await alice.run()
    await train(alice, run, 1)
    await server.service.parts.ledger.flush()
    server.service.parts.database.engine.dispose()  # what its connections have read they would not read again
    # Not by this process: to close a file that SQLite has open would give up its locks.
    damage = (
        f"import sqlite3; p = {str(path)!r}; c = sqlite3.connect(p); c.execute('PRAGMA wal_checkpoint(TRUNCATE)'); "
        "f = open(p, 'r+b'); n = f.seek(0, 2); f.seek(4096); f.write(b'\\xff' * (n - 4096)); f.flush()"
    )
    subprocess.run([sys.executable, "-c", damage], check=True)
    with pytest.raises(Exception, match="malformed"):
        await alice.ask(m.SessionHeartbeatRequest(session_id=session_of(run)))
    failure = await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=3, path="name"))
    assert isinstance(failure, m.Failure) and "under error id" in failure.error
    await train(alice, run, 4)
    server.service.check()
    await check_state(server.worker, run, 2)
    server.kill()  # its close would try to write to it
