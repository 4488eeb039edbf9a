"""Sessions and notes on them: bounded in number and bytes, and found by threads of their own that read few of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_service import MODEL, Tenant, make_service

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, LimitReached, QuotaReached
from twinkle.protocol.types import LoraConfig, ModelInput, SamplingParams
from twinkle.server.config import LimitsSection
from twinkle.server.keys import KeyRing, create_key, revoke_key
from twinkle.server.service import session_search
from twinkle.server.store import tables
from twinkle.server.store.database import Database


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    started: list[Tenant] = []

    async def start(name: str = "alice", **limits: Any) -> Tenant:
        tenant = Tenant(make_service(tmp_path, limits=LimitsSection(**limits)), name)
        started.append(tenant)
        await tenant.service.start()
        return tenant

    yield start
    for tenant in started:
        await tenant.service.close()


async def test_metadata_that_is_too_long_is_refused_wherever_it_is_kept(start: Callable[..., Any]):
    alice = await start(max_metadata_bytes=100)
    fits = {"a": "ä" * 46}  # {"a":"..."} is 8 bytes, and each letter two
    for metadata, is_long in ((fits, False), ({"a": fits["a"] + "b"}, True), ({"a": {"b": [1] * 60}}, True)):
        session = await alice.session()
        run = await alice.run()
        requests: list[Any] = [
            m.CreateSessionRequest(user_metadata=metadata),
            m.CreateModelRequest(
                session_id=session,
                model_seq_id=0,
                base_model=MODEL,
                lora_config=LoraConfig(rank=2),
                user_metadata=metadata,
            ),
            m.SaveWeightsRequest(model_id=run, seq_id=1, path="a", user_metadata=metadata),
            m.SaveWeightsForSamplerRequest(model_id=run, seq_id=2, path="a", user_metadata=metadata),
        ]
        for request in requests:
            send = alice.ask if isinstance(request, m.CreateSessionRequest) else alice.do
            if is_long:
                with pytest.raises(InvalidRequest, match=r"user_metadata: .*limits\.max_metadata_bytes"):
                    await send(request)
            else:
                assert not isinstance(await send(request), m.Failure)


async def test_a_session_too_many_is_refused_and_those_that_are_over_make_room(start: Callable[..., Any]):
    alice = await start(max_sessions_per_tenant=5)
    bob = Tenant(alice.service, "bob")
    run = await alice.run()
    others = [await alice.session() for _ in range(4)]
    with pytest.raises(QuotaReached, match=r"limits\.max_sessions_per_tenant: 5 sessions"):
        await alice.session()
    await bob.session()
    for _ in range(20):  # begun and finished, as often as one likes: no more rows are kept
        await alice.ask(m.FinishSessionRequest(session_id=others.pop(0)))
        others.append(await alice.session())
    assert len((await alice.ask(m.ListSessions(limit=100))).sessions) == 5
    # What left a run behind is not deleted, but is over.
    await alice.ask(m.FinishSessionRequest(session_id=run.split(":")[0]))
    await alice.session()
    assert run.split(":")[0] in (await alice.ask(m.ListSessions(limit=100))).sessions


async def test_the_same_session_is_made_again_where_there_is_no_room(start: Callable[..., Any]):
    alice = await start(max_sessions_per_tenant=1)
    request = m.CreateSessionRequest(idempotency_key="k")
    assert await alice.ask(request) == await alice.ask(request)


class Rows:
    """Counts what searches read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.light, self.whole = 0, 0
        find, whole = Database.find_sessions, Database.session_metadata

        def count_light(*args: Any) -> Any:
            rows = find(*args)
            self.light += len(rows)
            return rows

        def count_whole(*args: Any) -> Any:
            rows = whole(*args)
            self.whole += len(rows)
            return rows

        monkeypatch.setattr(Database, "find_sessions", count_light)
        monkeypatch.setattr(Database, "session_metadata", count_whole)


async def test_a_search_for_what_is_nowhere_reads_no_rows_and_one_for_notes_few(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    alice = await start()
    database: Database = alice.service.parts.database
    for number in range(500):
        database.put(
            tables.Session(
                id=f"s{number}",
                tenant="alice",
                created_at=float(number),
                display_name=f"Run {number} ÄÖ",
                user_metadata={"number": str(number)},
            )
        )
    rows = Rows(monkeypatch)
    assert (await alice.ask(m.SearchSessions(display_name="nowhere"))).sessions == []
    assert (await alice.ask(m.SearchSessions(session_id="nowhere"))).sessions == []
    assert (await alice.ask(m.SearchSessions(project_ids=["nowhere"]))).sessions == []
    finished = [m.StatusQuery(type="client_finished")]
    assert (await alice.ask(m.SearchSessions(statuses=finished))).sessions == []
    assert (rows.light, rows.whole) == (0, 0)
    found = await alice.ask(m.SearchSessions(display_name="RUN 499 äö"))
    assert [row.display_name for row in found.sessions] == ["Run 499 ÄÖ"]
    assert rows.light == rows.whole == 1
    # As many words, and as many projects, as one may ask for.
    words = " ".join(chr(97 + i % 26) + chr(97 + i // 26 % 26) for i in range(340))
    assert (await alice.ask(m.SearchSessions(display_name=words))).sessions == []
    assert (await alice.ask(m.SearchSessions(project_ids=[str(i) for i in range(1000)]))).sessions == []
    # Where all must be read that is bounded, and the cursor goes on from there.
    monkeypatch.setattr(session_search, "MOST_READ", 200)
    query, pages, found_ids = m.SearchSessions(user_metadata={"number": "7"}), 0, []
    while True:
        before = rows.light
        page = await alice.ask(query)
        assert rows.light - before <= 200
        pages, found_ids = pages + 1, found_ids + [row.session_id for row in page.sessions]
        if page.next_cursor is None:
            break
        query = query.model_copy(update={"cursor": page.next_cursor})
    assert found_ids == ["s7"] and pages == 3


async def test_a_tenants_slow_queries_leave_threads_for_others_and_for_keys(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    alice = await start()
    bob = Tenant(alice.service, "bob")
    database: Database = alice.service.parts.database
    ring, key = KeyRing(database), create_key(database, "alice")[1]
    may_end, under_way = threading.Event(), []
    find = Database.find_sessions

    def slow(self: Database, tenant: str, *args: Any) -> Any:
        if tenant == "alice":
            under_way.append(tenant)
            assert may_end.wait(20)
        return find(self, tenant, *args)

    monkeypatch.setattr(Database, "find_sessions", slow)
    try:
        searches = [asyncio.create_task(alice.ask(m.SearchSessions())) for _ in range(300)]
        # All these answers come while alice's searches are under way.
        assert (await bob.ask(m.SearchSessions())).sessions == []
        assert (await ring.of_key(key)).tenant == "alice"
        run = await alice.run()
        assert (await alice.do(m.OptimStepRequest(model_id=run, seq_id=1))) is not None
        assert len(under_way) == 2
        refused = [task.exception() for task in searches if task.done()]
        assert len(refused) == 300 - 256 and all(isinstance(error, LimitReached) for error in refused)
    finally:
        may_end.set()
    await asyncio.gather(*searches, return_exceptions=True)


# ---------------------------------------------------------------- keys


class SlowDatabase:
    """One whose keys are read as slowly as one likes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.may_read = threading.Event()
        self.may_read.set()
        self.reads = 0

    def keys(self, valid_only: bool = False) -> list[tables.ApiKey]:
        self.reads += 1
        assert self.may_read.wait(20)
        return self._database.keys(valid_only)


async def test_keys_are_known_while_they_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from twinkle.server import keys

    real = Database(f"sqlite:///{tmp_path / 'keys.sqlite'}")
    row, key = create_key(real, "alice")
    database = SlowDatabase(real)
    ring = KeyRing(database)  # pyright: ignore[reportArgumentType]
    assert (await ring.of_key(key)).tenant == "alice"
    assert database.reads == 1
    database.may_read.clear()
    monkeypatch.setattr(keys, "_REVOKED_WITHIN", 0.0)  # they should be read again for each request
    monkeypatch.setattr(keys, "_READ_SECONDS", 0.01)
    for _ in range(20):
        assert (await ring.of_key(key)).tenant == "alice"
    assert database.reads == 2  # one reading, for all of them
    revoke_key(real, row.id)
    database.may_read.set()
    monkeypatch.setattr(keys, "_READ_SECONDS", 10.0)
    for _ in range(2):  # the reading that was under way may have begun before
        try:
            await ring.of_key(key)
        except keys.Unauthorized:
            break
    else:
        pytest.fail("a revoked key was let in")
    # Those from before are not good for ever.
    database.may_read.clear()
    monkeypatch.setattr(keys, "_READ_SECONDS", 0.01)
    monkeypatch.setattr(keys, "_GOOD_FOR", 0.0)
    asking = asyncio.create_task(ring.of_key(create_key(real, "bob")[1]))
    await asyncio.sleep(0.05)
    assert not asking.done()
    database.may_read.set()
    assert (await asking).tenant == "bob"
    real.close()


async def test_samples_that_were_paused_come_to_an_end_though_their_session_is_finished(tmp_path: Path):
    service = make_service(tmp_path)
    await service.start()
    alice = Tenant(service, "alice")
    session = await alice.session()
    request = m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    sampler = (await alice.ask(request)).sampling_session_id
    sample = m.SampleRequest(
        sampling_session_id=sampler,
        seq_id=0,
        prompt=ModelInput.from_ints([1, 2]),
        sampling_params=SamplingParams(max_tokens=2),
    )
    promise = await service.submit("alice", sample)
    service.parts.samples.pause(session)  # pyright: ignore[reportPrivateUsage]
    await alice.ask(m.FinishSessionRequest(session_id=session))
    while service.parts.futures.is_pending(promise.request_id):  # pyright: ignore[reportPrivateUsage]
        await asyncio.sleep(0.005)
    assert not isinstance(await alice.outcome(promise), m.Failure)
    await service.close()
