"""Samplers as real Ray actors with processes of their own, and which of them draws what."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.config import ModelSection, ServerConfig
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.plan import Plan
from twinkle.server.sampler_plan import SamplerPlan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve import sampler_on_demand, sampler_pool
from twinkle.server.serve.rpc import Call, Connection, ConnectionLost
from twinkle.server.serve.sampler_handle import SamplerHandle
from twinkle.server.serve.sampler_pool import SamplerPool

pytestmark = pytest.mark.serve

TOKENS = np.array([1, 2, 3])
STATE = AdapterState(AdapterSpec(rank=2), ["w"], {"weights": np.ones((2, 3), np.float32)})


def request(adapter_id: str | None, num_samples: int = 1, request_id: str = "") -> GenerateRequest:
    params = SamplingParams(max_tokens=2)
    return GenerateRequest("alice", adapter_id, TOKENS, params, num_samples, request_id=request_id)


async def drawn(pool: SamplerPool, adapter_id: str | None, num_samples: int = 1) -> list[list[int]]:
    response = await pool.generate(request(adapter_id, num_samples))
    return [list(sequence.tokens) for sequence in response.sequences]


# The fake engine counts on from the sum of the prompt.
DRAWN = [[6, 7]]


@pytest.fixture(scope="module")
def placement() -> Iterator[PlacementGroup]:
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )
    placement = placement_group([{"CPU": 1.0}] * 3, strategy="PACK")
    ray.get(placement.ready(), timeout=60)
    yield placement
    ray.shutdown()


def plan(engine: str = "fake", processes: int = 2, max_processes: int = 2) -> Plan:
    """One rank, which isn't started here, and samplers that are to draw four sequences each."""
    model = ModelConfig(Path("fake"))
    # Processes that are stopped for a while aren't lost, however slow the machine is.
    config = ServerConfig(model=ModelSection(model_id="org/fake", heartbeat_timeout_seconds=600))
    samplers = SamplerPlan(engine, processes, model, 0, None, max_processes, target_sequences=4)
    return Plan(config, model, "fake", samplers, gpus_per_rank=0)


@pytest.fixture
async def pool(placement: PlacementGroup) -> AsyncIterator[SamplerPool]:
    pool = await SamplerPool.start(plan(), placement)
    yield pool
    await pool.close()
    pool.end()


def process_of(sampler: Any) -> int:
    return ray.get(sampler.actor.__ray_call__.remote(lambda _actor: os.getpid()))


def resident(sampler: Any) -> list[str]:
    return ray.get(
        sampler.actor.__ray_call__.remote(lambda actor: actor._loading.result()._engine.resident_adapters())
    )


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_an_adapter_is_where_it_was_published_and_is_fetched_where_it_is_asked_for(pool: SamplerPool):
    first, second = pool._up
    await pool.add_adapter("a@1", STATE)
    await pool.add_adapter("a@1", STATE)
    assert [resident(first), resident(second)] == [["a@1"], []]
    assert await drawn(pool, "a@1") == DRAWN
    first.drawing = 7
    assert await drawn(pool, "a@1") == DRAWN and resident(second) == [], "one that has it is preferred"
    first.drawing = 100
    assert await drawn(pool, "a@1") == DRAWN and resident(second) == ["a@1"]
    assert await drawn(pool, None, 3) == [[6, 7], [7, 8], [8, 9]]
    with pytest.raises(NotFound, match=r"'a@2' is not published"):
        await pool.generate(request("a@2"))
    await pool.remove_adapter("a@1")
    assert resident(first) == resident(second) == []
    assert (first.drawing, second.drawing) == (100, 0)
    await pool.cancel("a request that nobody knows")


async def test_a_killed_sampler_costs_a_retry_and_comes_back(pool: SamplerPool):
    await pool.add_adapter("a", STATE)
    assert await drawn(pool, "a") == DRAWN
    lost, other = pool._up
    os.kill(process_of(lost), signal.SIGKILL)
    for _ in range(20):  # whatever moment it is noticed at: as `SampleRunner` does
        try:
            assert await drawn(pool, "a") == DRAWN
        except WorkerLost as error:
            assert "a sampler" in error.reason
            assert await drawn(pool, "a") == DRAWN
    await until(lambda: lost not in pool._up and len(pool._up) == 2)
    back = pool._up[1]
    assert resident(back) == []
    other.drawing = 100
    assert await drawn(pool, "a") == DRAWN
    assert resident(back) == ["a"], "nobody had to publish it again"
    other.drawing = 0


async def test_while_all_are_away_samples_wait_and_adapters_are_published(pool: SamplerPool):
    for process in [process_of(sampler) for sampler in pool._up]:
        os.kill(process, signal.SIGKILL)
    await until(lambda: not pool._up)
    waiting = asyncio.create_task(drawn(pool, "a"))
    await pool.add_adapter("a", STATE)
    assert await waiting == DRAWN


async def test_samplers_that_cannot_be_started_again_are_given_up(
    pool: SamplerPool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampler_pool, "_PAUSE_SECONDS", 0.0)
    pool._plan = plan(engine="nonesuch")
    for process in [process_of(sampler) for sampler in pool._up]:
        os.kill(process, signal.SIGKILL)
    with pytest.raises(ServerFault, match="no sampler could be started again"):
        while True:
            try:
                await pool.generate(request(None))
            except WorkerLost:
                continue


async def test_an_engine_that_is_not_there_is_named_at_the_start(placement: PlacementGroup):
    with pytest.raises(InvalidRequest, match="'nonesuch' is not installed"):
        await SamplerPool.start(plan(engine="nonesuch"), placement)


# ---------------------------------------------------------------- as many as the load asks for


@pytest.fixture
async def scaled(placement: PlacementGroup) -> AsyncIterator[SamplerPool]:
    """One sampler, and a second one for more than four sequences. The cluster has room for that, and no more."""
    pool = await SamplerPool.start(plan("fake", 1, 2), placement, upscale_delay=0, downscale_delay=0)
    yield pool
    for process in _held.copy():
        go_on(process)
    await pool.close()
    assert not pool._on_demand and placement_groups("PENDING") == 0 and placement_groups("CREATED") == 1
    pool.end()


_held: set[int] = set()


def hold(process: int) -> None:
    """What it is asked for waits."""
    _held.add(process)
    os.kill(process, signal.SIGSTOP)


def go_on(process: int) -> None:
    _held.discard(process)
    os.kill(process, signal.SIGCONT)


def placement_groups(state: str) -> int:
    return sum(group["state"] == state for group in cast(Any, ray.util.placement_group_table()).values())


async def sampled(pool: SamplerPool, number: int) -> list[list[int]]:
    """As `SampleRunner` does it."""
    while True:
        try:
            response = await pool.generate(request("a", request_id=f"sample {number}"))
            return [list(sequence.tokens) for sequence in response.sequences]
        except WorkerLost:
            continue


def begin(pool: SamplerPool, count: int) -> list[asyncio.Task[list[list[int]]]]:
    return [asyncio.create_task(sampled(pool, number)) for number in range(count)]


async def gone(process: int) -> None:
    def is_gone() -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text("utf-8")

    await until(is_gone)


async def test_a_second_sampler_comes_with_the_load_and_goes_with_it(scaled: SamplerPool):
    await scaled.add_adapter("a", STATE)
    [first] = scaled._up
    first_process = process_of(first)
    hold(first_process)
    samples = begin(scaled, 12)
    await until(lambda: sum(sample.done() for sample in samples) == 6)
    assert [sample.done() for sample in samples] == [False] * 6 + [True] * 6, "it draws half, the newest"
    [one] = scaled._on_demand
    second, [first_again, up] = one.handle, scaled._up
    assert first_again is first and up is second and second is not None and "a" in second.adapters
    assert first.drawing == 6 and placement_groups("CREATED") == 2
    # With six sequences it stays; what is given to it now, it has when it is to go.
    process = process_of(second)
    hold(process)
    last = asyncio.create_task(sampled(scaled, 12))
    await until(lambda: second.samples)
    go_on(first_process)
    assert await asyncio.gather(*samples) == [DRAWN] * 12
    await until(lambda: scaled._up == [first])
    assert one.is_leaving and not last.done()
    # The load returns before it has gone: it stays.
    hold(first_process)
    more = begin(scaled, 8)
    await until(lambda: second in scaled._up)
    assert scaled._on_demand == [one] and not last.done()
    go_on(process)
    go_on(first_process)
    assert await asyncio.gather(last, *more) == [DRAWN] * 9
    await until(lambda: not scaled._on_demand)
    await gone(process)
    assert scaled._up == [first] and (first.drawing, second.drawing, scaled._sequences) == (0, 0, 0)
    await until(lambda: placement_groups("CREATED") == 1)
    assert await sampled(scaled, 13) == DRAWN


async def test_a_killed_second_sampler_is_replaced_and_no_sample_is_lost(scaled: SamplerPool):
    await scaled.add_adapter("a", STATE)
    [first] = scaled._up
    first_process = process_of(first)
    hold(first_process)
    samples = begin(scaled, 12)
    await until(lambda: len(scaled._up) == 2)
    killed = scaled._up[1]
    process = process_of(killed)
    os.kill(process, signal.SIGKILL)
    samples += begin(scaled, 6)
    await until(lambda: len(scaled._up) == 2 and scaled._up[1] is not killed)
    assert process_of(scaled._up[1]) != process
    go_on(first_process)
    assert await asyncio.gather(*samples) == [DRAWN] * 18


async def test_a_sampler_for_which_there_is_no_room_waits_for_it(
    scaled: SamplerPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sampler_on_demand, "_ROOM_SECONDS", 1)
    await scaled.add_adapter("a", STATE)
    other = placement_group([{"CPU": 1.0}])
    await asyncio.to_thread(other.wait, 60)
    [first] = scaled._up
    process = process_of(first)
    hold(process)
    samples = begin(scaled, 5)
    await until(lambda: caplog.messages)
    assert caplog.messages == [
        "The cluster has no room for sampler 1; it starts when there is, if it is still wanted."
    ]
    go_on(process)
    assert await asyncio.gather(*samples) == [DRAWN] * 5
    await until(lambda: not scaled._on_demand)
    assert placement_groups("PENDING") == 0, "nothing waits for room that nobody needs"
    hold(process)
    samples = begin(scaled, 5)
    await until(lambda: len(caplog.messages) == 2)
    ray.util.remove_placement_group(other)
    await until(lambda: len(scaled._up) == 2)
    go_on(process)
    assert await asyncio.gather(*samples) == [DRAWN] * 5


async def test_a_second_sampler_that_cannot_be_started_is_tried_again_later(
    scaled: SamplerPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sampler_pool, "_FAILED_SECONDS", 0.5)
    await scaled.add_adapter("a", STATE)
    scaled._plan = plan("nonesuch", 1, 2)
    [first] = scaled._up
    process = process_of(first)
    hold(process)
    samples = begin(scaled, 5)
    await until(lambda: caplog.messages)
    assert (
        "Sampler 1 could not be started: twinkle.sampling_engines: 'nonesuch' is not installed"
        in caplog.messages[0]
    )
    scaled._plan = plan("fake", 1, 2)
    await until(lambda: len(scaled._up) == 2)
    go_on(process)
    assert await asyncio.gather(*samples) == [DRAWN] * 5


# ---------------------------------------------------------------- with stand-ins


class StandIn(Connection):
    """To a sampler that draws until it is told to stop."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.drawing: list[asyncio.Future[Any]] = []
        self._ended: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()

    def call(self, call: Call, wants_result: bool = True) -> asyncio.Future[Any]:
        self.calls.append(call.method)
        answer = asyncio.get_running_loop().create_future()
        if call.method == "generate":
            self.drawing.append(answer)
        else:
            answer.set_result(None)
        return answer

    async def lost(self) -> ConnectionLost:
        return await asyncio.shield(self._ended)

    def close(self) -> None:
        if not self._ended.done():
            self._ended.set_result(ConnectionLost("hung up on"))


class Actor:
    """What a stand-in's Ray actor would do: it takes adapters, or refuses them."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.added: list[str] = []
        self.add_adapter = self
        self._refuses = refuses

    async def remote(self, adapter_id: str, _published: Any) -> None:
        self.added.append(adapter_id)
        if self._refuses is not None:
            raise self._refuses


def pool_of(actors: list[Actor]) -> tuple[SamplerPool, list[StandIn]]:
    connections = [StandIn() for _ in actors]
    samplers = [SamplerHandle(*pair) for pair in zip(actors, connections, strict=True)]
    return SamplerPool(plan(), cast(Any, None), samplers), connections


@pytest.mark.usefixtures("placement")
async def test_the_sampler_that_draws_the_fewest_sequences_is_chosen():
    pool, connections = pool_of([Actor(), Actor()])
    samples = [asyncio.create_task(pool.generate(request(None, count))) for count in (3, 1, 1, 1)]
    await until(lambda: sum(len(one.drawing) for one in connections) == 4)
    assert [len(one.drawing) for one in connections] == [1, 3]
    for one in connections:
        for drawing in one.drawing:
            drawing.set_result("done")
    assert await asyncio.gather(*samples) == ["done"] * 4
    for keeper in pool._keepers:
        keeper.cancel()


@pytest.mark.usefixtures("placement")
async def test_a_refused_adapter_is_not_published_and_a_broken_device_ends_its_sampler(
    monkeypatch: pytest.MonkeyPatch,
):
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    actor = Actor(InvalidRequest("rank: 200 is more than this engine takes"))
    pool, [connection] = pool_of([actor])
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="rank: 200"):
            await pool.add_adapter("a", STATE)
    assert actor.added == ["a", "a"] and pool._published == {}
    sample = asyncio.create_task(pool.generate(request(None)))
    await until(lambda: connection.drawing)
    connection.drawing[0].set_exception(RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(WorkerLost, match="ended or hung"):
        await sample
    await until(lambda: killed)
    assert killed == [actor] and pool._up == []
    for keeper in pool._keepers:
        keeper.cancel()
