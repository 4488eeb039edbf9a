"""PostgreSQL: several writers at once, and a server that is away for a while."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running_postgresql import RunningPostgresql
from spawned import make_and_read

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.app import build_signer
from twinkle.server.config import ServerConfig, parse_config
from twinkle.server.keys import KeyRing, create_key
from twinkle.server.serve.launch import checks
from twinkle.server.store import retry
from twinkle.server.store.database import Database
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import Checkpoint, CustomLoss, Run, SamplingSession, Session, Usage

NOW = 1_800_000_000.0
AT_ONCE = 12


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def a_run(run_id: str, session_id: str = "s") -> Run:
    return Run(
        id=run_id,
        tenant="t",
        session_id=session_id,
        base_model="m",
        created_at=NOW,
        last_request_at=NOW,
        rank=2,
    )


def a_checkpoint(name: str, size: int = 1) -> Checkpoint:
    return Checkpoint(
        run_id="run",
        kind="weights",
        name=name,
        tenant="t",
        base_model="m",
        created_at=NOW,
        size_bytes=size,
        rank=2,
        train_attn=True,
        train_mlp=True,
        train_unembed=False,
        public=False,
    )


def at_once(work: Callable[[int], object], times: int = AT_ONCE) -> list[object]:
    """The results of `work(0)`, `work(1)`, ..., each in a thread, all beginning together."""
    barrier = threading.Barrier(times)

    def together(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(together, range(times)))


# ---------------------------------------------------------------- several at once


def test_each_client_that_joins_a_sampler_gets_a_number_of_its_own(database: Database):
    database.put(Session(id="s", tenant="t", created_at=NOW))
    database.put(SamplingSession(id="p", tenant="t", session_id="s", base_model="m", created_at=NOW))
    numbers = at_once(lambda _: database.join_sampler("t", "p"))
    assert sorted(numbers) == list(range(1, AT_ONCE + 1))  # pyright: ignore[reportArgumentType]


def test_a_row_that_many_write_is_written(database: Database):
    database.put(Session(id="s", tenant="t", created_at=NOW))
    for number in range(3):
        at_once(lambda i, n=number: database.put(a_run(f"run-{n}-{i % 2}")))
        at_once(
            lambda _, n=number: database.put(CustomLoss(id=f"loss-{n}", tenant="t", session_id="s", body=""))
        )
    assert len(database.run_ids("s")) == 6


def test_usage_of_many_writers_adds_up(database: Database):
    def write(number: int) -> None:
        rows = [
            Usage(tenant="t", hour=h, session_id="s", kind="training", base_model="m", count=1)
            for h in range(9)
        ]
        database.write_ledger(rows if number % 2 else rows[::-1], {"b": NOW, "a": NOW})

    for _ in range(3):
        at_once(write)
    assert [row.count for row in database.usage("t", 0, 100)] == [3 * AT_ONCE] * 9


def test_a_count_beyond_32_bits_is_kept(database: Database):
    database.put_checkpoint(a_checkpoint("large", size=2**40))
    total = database.checkpoint_total("t", NOW)
    assert (total.count, total.size_bytes) == (1, 2**40)


def test_checkpoints_that_are_saved_at_once_have_different_times(postgresql: RunningPostgresql):
    database = Database(postgresql.new_database())
    at_once(lambda number: database.put_checkpoint(a_checkpoint(f"name-{number}")))
    rows, total = database.checkpoints("t", NOW)
    assert total == AT_ONCE == len({row.created_at for row in rows})
    at_once(lambda _: database.put_checkpoint(a_checkpoint("name-0")))
    newest = database.checkpoint("t", CheckpointUri("name-0"), NOW)
    assert newest is not None and newest.created_at > max(row.created_at for row in rows)
    database.close()


def test_sessions_that_are_deleted_take_no_run_along(database: Database):
    for number in range(30):
        database.put(Session(id=f"s{number}", tenant="t", created_at=NOW - 10, finished_at=NOW))
    added: list[str] = []

    def work(number: int) -> None:
        if number % 2:
            database.delete_empty_sessions("t", NOW, set())
            return
        for i in range(number, 30, 6):
            try:
                database.put(a_run(f"run-{number}-{i}", f"s{i}"))
                added.append(f"s{i}")
            except Exception as error:  # its session was deleted first
                assert "foreign key" in str(error).lower(), error

    at_once(work, 6)
    for session_id in added:
        assert database.session("t", session_id) is not None and database.run_ids(session_id)


def test_processes_that_start_at_once_on_an_empty_database_agree(postgresql: RunningPostgresql):
    url = postgresql.new_database()
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=make_and_read, args=(url, barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    secrets = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(secrets) == 1


def a_config(url: str, directory: Path) -> ServerConfig:
    storage = {"root": str(directory), "database_url": url}
    return parse_config({"model": {"model_id": "x"}, "server": {"port": 0}, "storage": storage})


def test_machines_that_share_a_database_accept_each_others_tokens(
    postgresql: RunningPostgresql, tmp_path: Path
):
    url = postgresql.new_database()
    (tmp_path / "a").mkdir(mode=0o700)
    (tmp_path / "a" / "secret").write_text("5" * 64)  # one that was in use before
    before = build_signer(
        parse_config({"model": {"model_id": "x"}, "storage": {"root": str(tmp_path / "a")}})
    )
    one, other = (build_signer(a_config(url, tmp_path / name)) for name in ("a", "b"))
    for signer in (before, one):
        assert other.read_key_token(signer.key_token("tenant")).tenant == "tenant"
    assert not (tmp_path / "b" / "secret").exists()


def test_what_the_database_cannot_hold_is_the_callers_mistake(postgresql: RunningPostgresql):
    database = Database(postgresql.new_database())
    for name in ("a\0b", "x" * 257):
        with pytest.raises(InvalidRequest, match="can't be stored"):
            database.put(Session(id="s", tenant="t", created_at=NOW, display_name=name))
    with pytest.raises(InvalidRequest, match="can't be stored"):
        database.session("t", "a\0b")
    database.close()


# ---------------------------------------------------------------- away for a while


@pytest.fixture
def away(postgresql: RunningPostgresql) -> Iterator[RunningPostgresql]:
    yield postgresql
    postgresql.start_if_stopped()


async def test_a_server_that_is_away_is_waited_for(away: RunningPostgresql, caplog: pytest.LogCaptureFixture):
    database = Database(away.new_database())
    database.put(Session(id="s", tenant="t", created_at=NOW))
    ledger = Ledger(database, "m")
    ring = KeyRing(database)
    _, key = create_key(database, "t")
    assert (await ring.of_key(key)).tenant == "t"
    away.stop()
    with pytest.raises(DatabaseGone, match="can't be reached just now") as caught:
        database.session("t", "s")
    assert (caught.value.status, caught.value.retry_after) == (503, 5.0)
    assert str(away.port) not in caught.value.message
    assert (await ring.of_key(key)).tenant == "t", "those that were read a moment ago hold"
    ledger.record("t", "s", "training", 5)
    with pytest.raises(DatabaseGone):
        await ledger.flush()
    saving = asyncio.create_task(
        retry.retry_while_unavailable(lambda: database.put_checkpoint(a_checkpoint("name")))
    )
    for _ in range(20):
        await asyncio.sleep(0.05)
    assert not saving.done()
    away.start()
    await saving
    await ledger.flush()
    assert [row.count for row in database.usage("t", 0, 2**30)] == [5]
    assert database.session("t", "s") is not None
    assert [r.levelname for r in caplog.records if "the database" in r.message] == ["ERROR", "WARNING"]
    database.close()


def test_a_connection_that_the_server_has_ended_is_replaced(postgresql: RunningPostgresql):
    database = Database(postgresql.new_database())
    at_once(lambda _: database.session("t", "s"))
    postgresql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
    at_once(lambda _: database.session("t", "s"))
    database.close()


# ---------------------------------------------------------------- at the start


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://twinkle:hidden@127.0.0.1:9/none", "can't be used .*refused"),
        ("postgresql://twinkle:hidden@127.0.0.1:port/none", "not a URL"),
        ("no-such-database://hidden@host/none", "not a URL"),
        ("nothing hidden at all", "not a URL"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_at_launch(tmp_path: Path, url: str, said: str):
    pytest.importorskip("psycopg")
    with pytest.raises(InvalidRequest, match=f"storage.database_url: .*{said}") as caught:
        for check in checks(a_config(url, tmp_path)):
            check()
    assert "hidden" not in caught.value.message


def test_a_database_that_does_not_exist_is_told_at_launch(postgresql: RunningPostgresql, tmp_path: Path):
    url = postgresql.new_database().rpartition("/")[0] + "/no_such_database"
    with pytest.raises(InvalidRequest, match='storage.database_url.*"no_such_database" does not exist'):
        for check in checks(a_config(url, tmp_path)):
            check()


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'twinkle-server\[postgresql\]'"):
        Database("postgresql://host/database")
