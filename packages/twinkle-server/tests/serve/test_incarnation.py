"""When a group of ranks goes on after a failure, and when it is lost. The connections are stand-ins: what counts is
which rank answers what, and when.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.serve import ranks
from twinkle.server.serve.ranks import Incarnation
from twinkle.server.serve.rpc import Call, Connection, ConnectionLost


class StandIn(Connection):
    """To a process with one method, which does what the test says; `dead` ends it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.dead = asyncio.Event()
        self._work = work

    def call(self, call: Call, wants_result: bool = True) -> asyncio.Future[Any]:
        answer = asyncio.ensure_future(self._call(call, wants_result))
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody need look at it
        return answer

    async def _call(self, call: Call, wants_result: bool) -> Any:
        assert call.method == "work"
        working = asyncio.ensure_future(self._awaited())
        dying = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise ConnectionLost("dead")
        result = working.result()
        return result if wants_result else None

    async def _awaited(self) -> Any:
        result = self._work()
        return await result if asyncio.iscoroutine(result) else result

    async def lost(self) -> ConnectionLost:
        await self.dead.wait()
        return ConnectionLost("dead")

    def close(self) -> None:
        self.dead.set()


def group_of(*connections: StandIn, call_timeout: float | None = None) -> Incarnation:
    return Incarnation(connections, [], call_timeout)


def raises(error: Exception) -> Callable[[], Any]:
    def work() -> None:
        raise error

    return work


def hangs() -> Any:
    return asyncio.Event().wait()


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.05)


async def test_the_result_is_the_first_ranks():
    group = group_of(StandIn(lambda: "first"), StandIn(lambda: None))
    assert await group.all_ranks("work") == "first"


@pytest.mark.parametrize("error", [InvalidRequest("rank: 0"), KeyError("a"), ValueError("b"), MemoryError()])
async def test_what_all_ranks_raise_is_an_ordinary_error_and_the_group_lives_on(error: Exception):
    answers: list[Callable[[], Any]] = [raises(error), raises(type(error)("said otherwise"))]
    stand_ins = [StandIn(lambda: answers[0]()), StandIn(lambda: answers[1]())]
    group = group_of(*stand_ins)
    with pytest.raises(type(error)) as raised:
        await group.all_ranks("work")
    assert raised.value is error
    answers[:] = [lambda: 1, lambda: None]
    assert await group.all_ranks("work") == 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda: 1, raises(MemoryError("big")), "rank 0 succeeded, rank 1 failed with MemoryError: big"),
        (hangs, raises(MemoryError("big")), "rank 0 didn't answer, rank 1 failed with MemoryError: big"),
        (raises(KeyError("a")), raises(RuntimeError("b")), "rank 0 failed with KeyError: 'a', rank 1 failed"),
        (
            raises(RuntimeError("gloo: peer")),
            raises(RuntimeError("gloo: peer")),
            "rank 0 failed with RuntimeError: gloo: peer",
        ),
    ],
)
async def test_ranks_that_disagree_or_lost_their_connection_are_lost(first: Any, second: Any, said: str):
    group = group_of(StandIn(first), StandIn(second))
    with pytest.raises(WorkerLost) as loss:
        await group.all_ranks("work")
    assert re.search(said, loss.value.reason)
    assert await group.lost() is loss.value
    with pytest.raises(WorkerLost):
        await group.all_ranks("work")
    with pytest.raises(WorkerLost):
        await group.these_ranks([0], "work")


DEVICE_ERRORS = [
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "HIP error: unspecified launch failure",
]


@pytest.mark.parametrize("said", DEVICE_ERRORS)
async def test_a_device_that_fails_under_a_sample_is_lost_like_one_that_fails_under_a_pass(said: str):
    """A server that only samples would go on without it for ever."""
    group = group_of(StandIn(raises(RuntimeError(said))), StandIn(lambda: None))
    for _ in range(2):
        with pytest.raises(WorkerLost):
            await group.these_ranks([0], "work")
    assert (await group.lost()).reason == f"work: rank 0 failed with RuntimeError: {said}"
    with pytest.raises(WorkerLost):
        await group.all_ranks("work")


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("stop: 'CUDA error' is no list"),
        KeyError("CUDA error"),
        ValueError("NCCL"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
async def test_what_else_a_sample_raises_is_its_own(error: Exception):
    answers: list[Callable[[], Any]] = [raises(error)]
    group = group_of(StandIn(lambda: answers[0]()))
    with pytest.raises(type(error)) as raised:
        await group.these_ranks([0], "work")
    assert raised.value is error and not group.is_lost
    answers[:] = [lambda: 1]
    assert await group.these_ranks([0], "work") == [1]


async def test_a_device_that_fails_as_an_adapter_is_handed_over_is_lost():
    group = group_of(StandIn(lambda: None))
    group.check_device("publish", 0, ValueError("not finite"))
    with pytest.raises(WorkerLost):
        group.check_device("publish", 0, RuntimeError(DEVICE_ERRORS[0]))
    assert group.is_lost


async def test_a_call_that_takes_too_long_loses_the_group():
    group = group_of(StandIn(hangs), StandIn(lambda: None), call_timeout=0.1)
    with pytest.raises(WorkerLost) as loss:
        await asyncio.wait_for(group.all_ranks("work"), 10)
    said = "work: rank 0 didn't answer, rank 1 succeeded within 0.1 s (model.call_timeout_seconds)"
    assert loss.value.reason == said and group.is_lost


async def test_the_time_of_calls_that_wait_for_others_counts_from_the_last_answer():
    turn = asyncio.Lock()

    async def work() -> None:
        async with turn:
            await asyncio.sleep(0.2)

    group = group_of(StandIn(work), call_timeout=0.5)
    await asyncio.gather(*(group.all_ranks("work") for _ in range(4)))
    assert not group.is_lost


async def test_a_sample_may_take_as_long_as_it_likes():
    async def work() -> str:
        await asyncio.sleep(0.3)
        return "sample"

    assert await group_of(StandIn(work), call_timeout=0.1).these_ranks([0], "work") == ["sample"]


async def test_a_slow_rank_is_waited_for_as_long_as_none_has_failed():
    async def slow() -> str:
        await asyncio.sleep(0.2)  # longer than the time of grace
        return "slow"

    assert await group_of(StandIn(slow), StandIn(lambda: None)).all_ranks("work") == "slow"


async def test_a_death_ends_a_call_that_the_others_would_wait_in_for_ever():
    stand_ins = [StandIn(hangs), StandIn(hangs), StandIn(hangs)]
    group = group_of(*stand_ins)
    call = asyncio.create_task(group.all_ranks("work"))
    await asyncio.sleep(0.01)
    stand_ins[2].dead.set()
    with pytest.raises(WorkerLost) as loss:
        await call
    assert loss.value.reason == "rank 2: dead"


async def test_a_death_is_noticed_when_nothing_is_asked():
    stand_ins = [StandIn(hangs), StandIn(hangs)]
    group = group_of(*stand_ins)
    await asyncio.sleep(0)
    stand_ins[1].dead.set()
    assert (await group.lost()).reason == "rank 1: dead"


async def test_one_call_is_over_on_all_ranks_before_the_next_begins():
    began: list[str] = []
    gates = [asyncio.Event(), asyncio.Event()]

    def work(rank: int) -> Callable[[], Any]:
        async def run() -> None:
            began.append(f"rank {rank}")
            await gates[rank].wait()

        return run

    group = group_of(StandIn(work(0)), StandIn(work(1)))
    calls = [asyncio.create_task(group.all_ranks("work")) for _ in range(2)]
    await asyncio.sleep(0.02)
    gates[0].set()  # the first rank alone is ready for the next call
    await asyncio.sleep(0.02)
    assert began == ["rank 0", "rank 1"]
    gates[1].set()
    await asyncio.gather(*calls)
    assert began == ["rank 0", "rank 1"] * 2
