"""Several engines behind a router, as a gateway has it: which engine gets what. The engines are whole services, on the
fake backend; their rows are written as the server does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fake_service import MODEL, Tenant, make_service
from trained_states import a_pass, a_step

from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded, decode_result
from twinkle.protocol.errors import InvalidRequest, NotFound, Unavailable
from twinkle.protocol.types import ForwardBackwardOutput, ModelInput, SampleResponse
from twinkle.server.serve import fleet_view
from twinkle.server.serve.fleet_view import FleetView
from twinkle.server.serve.router import Router
from twinkle.server.service.service import Service
from twinkle.server.store.database import Database
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import Engine

OTHER = "fake/other"
SERVER = "8000-test"


class House:
    """Engines by name, their rows, and three gateways' routers."""

    def __init__(self, url: str, services: dict[str, Service]) -> None:
        self.services = services
        self.database = Database(url)
        self.routers = [
            Router(FleetView(self.database, SERVER), self.database, services.__getitem__) for _ in "abc"
        ]
        for name, service in services.items():
            self.database.add_engine(
                Engine(
                    server=SERVER,
                    name=name,
                    base_model=service.parts.model_name,
                    entry="{}",
                    is_added=False,
                    wanted="run",
                    state="running",
                )
            )

    def set(self, name: str, **values: object) -> None:
        self.database.change_engine(SERVER, name, **values)

    def tenant(self, name: str, gateway: int = 0) -> Tenant:
        router = self.routers[gateway]
        tenant = Tenant(router, name)  # pyright: ignore[reportArgumentType]

        async def outcome(promise: m.Promise) -> object:
            [fetched] = await router.fetch(name, [promise.request_id], 20)
            if isinstance(fetched, NotFound):
                raise fetched
            assert isinstance(fetched, Encoded)
            return decode_result(fetched)

        tenant.outcome = outcome
        return tenant

    def engine_of(self, run_id: str) -> str:
        [name] = [name for name, service in self.services.items() if service.parts.live.get(run_id)]
        return name


@pytest.fixture
async def house(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(fleet_view, "_FRESH_SECONDS", 0.0)
    services = {
        name: make_service(tmp_path, model=model, database_url=database_url, engine=name)
        for name, model in (("e1", MODEL), ("e2", MODEL), ("e3", OTHER))
    }
    for service in services.values():
        await service.start()
    house = House(database_url, services)
    yield house
    for service in services.values():
        await service.close()
    house.database.close()


def create(session: str, number: int, model: str = MODEL) -> m.CreateModelRequest:
    config = m.LoraConfig(rank=2, seed=0)
    return m.CreateModelRequest(session_id=session, model_seq_id=number, base_model=model, lora_config=config)


async def test_new_runs_go_where_there_are_fewest_and_stay_there(house: House):
    alice = house.tenant("alice")
    session = await alice.session()
    house.set("e1", runs=2)
    runs = [(await alice.do(create(session, number))).model_id for number in range(6)]
    placed = [house.engine_of(run) for run in runs]
    assert placed.count("e1") == 2 and placed.count("e2") == 4 and placed[:2] == ["e2", "e2"]
    for gateway in (0, 1):
        alice = house.tenant("alice", gateway)
        for run in runs:
            assert isinstance(await alice.do(a_pass(run, 1 + 2 * gateway)), ForwardBackwardOutput)
            await alice.do(a_step(run, 2 + 2 * gateway))
    with pytest.raises(NotFound):
        await house.tenant("bob", 1).do(a_pass(runs[0], 5))


async def test_a_repeated_creation_finds_the_first_through_any_gateway(house: House):
    alice, elsewhere = house.tenant("alice", 0), house.tenant("alice", 1)
    session = await alice.session()
    promises = await asyncio.gather(
        *(tenant.service.submit("alice", create(session, 0)) for tenant in (alice, elsewhere) * 4)
    )
    assert len({promise.request_id for promise in promises}) == 1
    house.engine_of(promises[0].model_id or "")


async def test_each_model_has_its_engines_and_unknown_ones_are_named(house: House):
    alice = house.tenant("alice")
    session = await alice.session()
    capabilities = await alice.ask(m.GetServerCapabilities())
    assert [model.model_name for model in capabilities.supported_models] == [MODEL, OTHER]
    assert house.engine_of((await alice.do(create(session, 0, OTHER))).model_id) == "e3"
    with pytest.raises(InvalidRequest, match=f"'a/b' is not served here.* '{MODEL}', '{OTHER}'"):
        await alice.do(create(session, 1, "a/b"))
    house.set("e3", state="starting")
    with pytest.raises(Unavailable, match="being started"):
        await alice.do(create(session, 2, OTHER))


async def test_a_session_lives_and_ends_on_all_engines_that_have_anything_of_it(house: House):
    alice = house.tenant("alice", 1)
    session = await alice.session()
    runs = [(await alice.do(create(session, number))).model_id for number in range(2)]
    runs.append((await alice.do(create(session, 2, OTHER))).model_id)
    assert {house.engine_of(run) for run in runs} == {"e1", "e2", "e3"}
    await alice.ask(m.SessionHeartbeatRequest(session_id=session))
    for service in house.services.values():
        lease = service.parts.leases.get(session)
        assert lease is not None and lease.sends_heartbeats
    await alice.ask(
        m.FinishSessionRequest.model_validate({"session_id": session, "reason": {"type": "success"}})
    )
    for service in house.services.values():
        assert not list(service.parts.live)
        assert service.parts.leases.get(session) is None


async def test_samples_are_drawn_beside_their_run_and_found_again(house: House):
    alice = house.tenant("alice")
    session = await alice.session()
    house.set("e1", runs=9)
    run = (await alice.do(create(session, 0))).model_id
    assert house.engine_of(run) == "e2"
    path = (await alice.do(m.SaveWeightsForSamplerRequest(model_id=run, seq_id=1, path="s"))).path
    house.set("e1", runs=0)
    house.set("e2", runs=9)
    made = m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=0, model_path=path)
    sampler = (await alice.ask(made)).sampling_session_id
    sample = m.SampleRequest(sampling_session_id=sampler, seq_id=0, prompt=ModelInput.from_ints([1, 2]))
    promise = await alice.service.submit("alice", sample)
    assert promise.request_id.endswith(".e2")  # though the other has fewer runs
    elsewhere = house.tenant("alice", 1)
    assert isinstance(await elsewhere.outcome(promise), SampleResponse)
    target = m.SamplingSessionTarget(sampling_session_id=sampler)
    ended = await elsewhere.ask(m.RetrieveFuturesRequest(target=target, timeout=5))
    assert [each.request_id for each in ended.completions] == [promise.request_id]
    base = m.CreateSamplingSessionRequest(session_id=session, sampling_session_seq_id=1, base_model=OTHER)
    other = (await alice.ask(base)).sampling_session_id
    sample = m.SampleRequest(sampling_session_id=other, seq_id=0, prompt=ModelInput.from_ints([1, 2]))
    assert (await alice.service.submit("alice", sample)).request_id.endswith(".e3")


async def test_ephemeral_weights_are_sampled_where_their_run_is_through_any_gateway(house: House):
    """Elsewhere they could not be read before they are written."""
    alice = house.tenant("alice")
    session = await alice.session()
    house.set("e1", runs=9)
    run = (await alice.do(create(session, 0))).model_id
    assert house.engine_of(run) == "e2"
    saved = m.SaveWeightsForSamplerRequest(model_id=run, seq_id=1, sampling_session_seq_id=0)
    sampler = (await alice.do(saved)).sampling_session_id
    sample = m.SampleRequest(sampling_session_id=sampler, seq_id=0, prompt=ModelInput.from_ints([1, 2]))
    elsewhere = house.tenant("alice", 1)
    promise = await elsewhere.service.submit("alice", sample)
    assert promise.request_id.endswith(".e2")
    assert isinstance(await elsewhere.outcome(promise), SampleResponse)


async def test_a_checkpoint_begins_runs_on_any_engine_of_its_model(house: House):
    alice = house.tenant("alice")
    session = await alice.session()
    run = (await alice.do(create(session, 0, OTHER))).model_id
    path = (await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="w"))).path
    for number, place in enumerate((path, "twinkle://w"), start=1):
        load = m.LoadWeightsRequest(session_id=session, model_seq_id=number, path=place)
        assert house.engine_of((await alice.do(load)).model_id) == "e3"
    with pytest.raises(NotFound, match="no checkpoint"):
        await alice.do(m.LoadWeightsRequest(session_id=session, model_seq_id=9, path="twinkle://nothing"))


async def test_what_names_a_moved_engine_means_the_one_that_has_its_runs(house: House):
    alice = house.tenant("alice")
    session = await alice.session()
    house.set("e2", runs=9)
    run = (await alice.do(create(session, 0))).model_id
    assert house.engine_of(run) == "e1"
    house.set("e1", state="draining")
    assert isinstance(await alice.do(a_pass(run, 1)), ForwardBackwardOutput)
    fresh = (await alice.do(create(session, 1))).model_id
    assert house.engine_of(fresh) == "e2"
    house.set("e1", state="stopped")
    with pytest.raises(Unavailable, match="being started or moved"):
        await alice.do(a_pass(run, 2))
    house.set("e1", wanted="remove")
    with pytest.raises(Unavailable, match="goes on when the model is added again"):
        await alice.do(a_pass(run, 2))
    house.set("e1", moved_to="e2")
    with pytest.raises(NotFound, match="no live run"):  # it was not really moved
        await alice.do(a_pass(run, 2))


async def test_it_is_ready_when_each_model_has_an_engine_that_is(house: House):
    await house.routers[0].ready()
    house.set("e1", state="failed")
    await house.routers[0].ready()
    house.set("e3", state="starting")
    with pytest.raises(Unavailable, match=f"{OTHER} is not ready"):
        await house.routers[0].ready()
    for name in house.services:
        house.set(name, state="stopped", wanted="remove")
    with pytest.raises(Unavailable):
        await house.routers[0].ready()
    with pytest.raises(Unavailable, match="no engine"):
        await house.tenant("alice").session()


async def test_usage_counts_what_each_engine_has_just_done(house: House):
    alice = house.tenant("alice")
    session = await alice.session()
    runs = [
        (await alice.do(create(session, number, model))).model_id
        for number, model in enumerate((MODEL, OTHER))
    ]
    for run in runs:
        await alice.do(a_pass(run, 1))
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = await alice.ask(m.GetUsage(starting_on=hour, ending_before=hour + timedelta(hours=1)))
    trained = {
        each.base_model: each.event_info.token_count
        for each in usage.data
        if each.event_info.type == "training"
    }
    assert trained == {MODEL: 3, OTHER: 3}


async def test_runs_go_on_while_the_database_is_away(house: House, monkeypatch: pytest.MonkeyPatch):
    alice = house.tenant("alice")
    run = (await alice.do(create(await alice.session(), 0))).model_id

    def gone(*_: object) -> list[Engine]:
        raise DatabaseGone("the database is away", 5.0)

    monkeypatch.setattr(house.database, "engines", gone)
    assert isinstance(await alice.do(a_pass(run, 1)), ForwardBackwardOutput)
    with pytest.raises(DatabaseGone):  # a gateway that has just begun knows nothing
        await house.tenant("alice", 2).do(a_pass(run, 2))
