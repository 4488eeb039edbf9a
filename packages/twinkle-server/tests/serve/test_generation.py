"""When a group of ranks goes on after a failure, and when it is lost. The processes are stand-ins: what counts is who
answers what, and when.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.serve import generation
from twinkle.server.serve.generation import Generation, ProcessEnded
from twinkle.server.serve.rpc import Call


class StandIn:
    """A process with one method, which does what the test says; `dead` ends it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.dead = asyncio.Event()
        self._work = work

    async def call(self, call: Call) -> Any:
        assert call.method == "work"
        working = asyncio.ensure_future(self._awaited())
        dying = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise ProcessEnded
        return working.result()

    async def _awaited(self) -> Any:
        result = self._work()
        return await result if asyncio.iscoroutine(result) else result

    async def ended(self) -> None:
        await self.dead.wait()

    def end(self) -> None:
        self.dead.set()


def raises(error: Exception) -> Callable[[], Any]:
    def work() -> None:
        raise error

    return work


def hangs() -> Any:
    return asyncio.Event().wait()


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GRACE_SECONDS", 0.05)


async def test_the_result_is_the_first_ranks():
    group = Generation([StandIn(lambda: "first"), StandIn(lambda: None)])
    assert await group.all_ranks("work") == "first"


@pytest.mark.parametrize("error", [InvalidRequest("rank: 0"), KeyError("a"), ValueError("b"), MemoryError()])
async def test_what_all_ranks_raise_is_an_ordinary_error_and_the_group_lives_on(error: Exception):
    answers: list[Callable[[], Any]] = [raises(error), raises(type(error)("said otherwise"))]
    ranks = [StandIn(lambda: answers[0]()), StandIn(lambda: answers[1]())]
    group = Generation(ranks)
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
    group = Generation([StandIn(first), StandIn(second)])
    with pytest.raises(WorkerLost) as loss:
        await group.all_ranks("work")
    assert re.search(said, loss.value.reason)
    assert await group.lost() is loss.value
    with pytest.raises(WorkerLost):
        await group.all_ranks("work")
    with pytest.raises(WorkerLost):
        await group.first_rank("work")


DEVICE_ERRORS = [
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "HIP error: unspecified launch failure",
]


@pytest.mark.parametrize("said", DEVICE_ERRORS)
async def test_a_device_that_fails_under_a_sample_is_lost_like_one_that_fails_under_a_pass(said: str):
    """A server that only samples would go on without it for ever."""
    group = Generation([StandIn(raises(RuntimeError(said))), StandIn(lambda: None)])
    for _ in range(2):
        with pytest.raises(WorkerLost):
            await group.first_rank("work")
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
    group = Generation([StandIn(lambda: answers[0]())])
    with pytest.raises(type(error)) as raised:
        await group.first_rank("work")
    assert raised.value is error and not group.is_lost
    answers[:] = [lambda: 1]
    assert await group.first_rank("work") == 1


async def test_a_device_that_fails_as_an_adapter_is_handed_over_is_lost():
    group = Generation([StandIn(lambda: None)])
    group.check_device("publish", ValueError("not finite"))
    with pytest.raises(WorkerLost):
        group.check_device("publish", RuntimeError(DEVICE_ERRORS[0]))
    assert group.is_lost


async def test_a_slow_rank_is_waited_for_as_long_as_none_has_failed():
    async def slow() -> str:
        await asyncio.sleep(0.2)  # longer than the time of grace
        return "slow"

    assert await Generation([StandIn(slow), StandIn(lambda: None)]).all_ranks("work") == "slow"


async def test_a_death_ends_a_call_that_the_others_would_wait_in_for_ever():
    ranks = [StandIn(hangs), StandIn(hangs), StandIn(hangs)]
    group = Generation(ranks)
    call = asyncio.create_task(group.all_ranks("work"))
    await asyncio.sleep(0.01)
    ranks[2].dead.set()
    with pytest.raises(WorkerLost) as loss:
        await call
    assert loss.value.reason == "rank 2"


async def test_a_death_is_noticed_when_nothing_is_asked():
    ranks = [StandIn(hangs), StandIn(hangs)]
    group = Generation(ranks)
    await asyncio.sleep(0)
    ranks[1].dead.set()
    assert (await group.lost()).reason == "rank 1"


async def test_one_call_is_over_on_all_ranks_before_the_next_begins():
    began: list[str] = []
    gates = [asyncio.Event(), asyncio.Event()]

    def work(rank: int) -> Callable[[], Any]:
        async def run() -> None:
            began.append(f"rank {rank}")
            await gates[rank].wait()

        return run

    group = Generation([StandIn(work(0)), StandIn(work(1))])
    calls = [asyncio.create_task(group.all_ranks("work")) for _ in range(2)]
    await asyncio.sleep(0.02)
    gates[0].set()  # the first rank alone is ready for the next call
    await asyncio.sleep(0.02)
    assert began == ["rank 0", "rank 1"]
    gates[1].set()
    await asyncio.gather(*calls)
    assert began == ["rank 0", "rank 1"] * 2
