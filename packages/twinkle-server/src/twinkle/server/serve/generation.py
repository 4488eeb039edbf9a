"""The ranks' processes of one start. They live and die together: each holds a part of what the others need.

Every training call goes to all ranks, one call after the other, so that all of them run the same calls in the same
order. The group is lost when one of its processes ends, and when its ranks no longer agree on what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from twinkle.protocol.errors import TwinkleError
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.serve.rpc import Call

# When one rank has failed, the others either fail likewise or wait for it in vain.
GRACE_SECONDS = 10.0

# Errors after which a process can't compute any more, though it lives: PyTorch has them as RuntimeErrors.
_BEYOND_REPAIR = (
    "CUDA error",
    "HIP error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "device-side assert",
    "NCCL",
    "gloo",
)


class RankProcess(Protocol):
    """A rank, as its generation sees it."""

    async def call(self, call: Call) -> Any:
        """The method's result, or what it raised.

        Raises:
            ProcessEnded: if the process did first.
        """
        ...

    async def ended(self) -> None:
        """Returns when the process has ended."""
        ...

    def end(self) -> None:
        """End the process, without asking it."""
        ...


class ProcessEnded(Exception):
    """A rank's process is gone."""


class Generation:
    """Calls to the ranks' processes, first to last. Single-threaded: called on one event loop."""

    def __init__(self, ranks: Sequence[RankProcess]) -> None:
        self._ranks = ranks
        self._lost: asyncio.Future[WorkerLost] = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Lock()
        self._watches = [asyncio.create_task(self._watch(rank)) for rank in range(len(ranks))]

    async def lost(self) -> WorkerLost:
        """Why the group is lost, as soon as it is."""
        return await asyncio.shield(self._lost)

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def all_ranks(self, method: str, *args: Any) -> Any:
        """The first rank's result.

        Raises:
            WorkerLost: if the group is lost.
            Exception: what all ranks raised.
        """
        return await self._each([Call(method, args)] * len(self._ranks))

    async def each_rank(self, method: str, arguments: list[tuple[Any, ...]]) -> Any:
        """As `all_ranks`, with arguments for each rank."""
        return await self._each([Call(method, args) for args in arguments])

    async def _each(self, of_ranks: list[Call]) -> Any:
        # One process takes its calls in order; several might take them in several.
        async with self._turn if len(self._ranks) > 1 else contextlib.nullcontext():
            self._check()
            calls = [asyncio.create_task(self._call(rank, call)) for rank, call in enumerate(of_ranks)]
            for call in calls:
                call.add_done_callback(_look_at)  # so that asyncio reports none that nobody asks any more
            ended = asyncio.create_task(_ended(calls))
            await asyncio.wait({ended, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            self._check()
            return self._agreed(of_ranks[0].method, calls)

    async def first_rank(self, method: str, *args: Any) -> Any:
        """
        Raises:
            WorkerLost: if the group is lost, or the rank can't compute any more.
            Exception: what else the rank raised.
        """
        self._check()
        try:
            return await self._call(0, Call(method, args))
        except Exception as error:
            self.check_device(method, error)
            raise

    def check_device(self, method: str, error: Exception) -> None:
        """
        Args:
            error: of the first rank's sampler.

        Raises:
            WorkerLost: if its process can't compute any more: who trains on that device can't either, and it has to be
                started anew with the others.
        """
        if _is_beyond_repair(error):
            raise self._lose(f"{method}: rank 0 failed with {type(error).__name__}: {error}") from error

    def end(self) -> None:
        """End the processes, without asking them."""
        for watch in self._watches:
            watch.cancel()
        for rank in self._ranks:
            rank.end()
        if not self._lost.done():
            self._lost.set_result(WorkerLost("it was ended"))

    async def close(self) -> None:
        """Let the ranks close what they hold; the processes end with the cluster."""
        for watch in self._watches:
            watch.cancel()
        if not self.is_lost:
            await self.all_ranks("close")

    # ------------------------------------------------------------ calls

    async def _call(self, rank: int, call: Call) -> Any:
        try:
            return await self._ranks[rank].call(call)
        except ProcessEnded as error:
            raise self._lose(f"rank {rank}") from error

    async def _watch(self, rank: int) -> None:
        await self._ranks[rank].ended()
        self._lose(f"rank {rank}")

    def _check(self) -> None:
        if self._lost.done():
            raise self._lost.result()

    def _lose(self, reason: str) -> WorkerLost:
        """The group is lost; the first reason counts."""
        if not self._lost.done():
            self._lost.set_result(WorkerLost(reason))
        return self._lost.result()

    # ------------------------------------------------------------ agreement

    def _agreed(self, method: str, calls: list[asyncio.Task[Any]]) -> Any:
        """What all ranks say, or the end of the group."""
        errors = [call.exception() if call.done() else None for call in calls]
        if all(call.done() for call in calls) and not any(errors):
            return calls[0].result()
        raised = [error for error in errors if error is not None]
        first = next((error for error in raised if isinstance(error, TwinkleError)), raised[0])
        if len({type(error) for error in errors}) == 1 and not _is_beyond_repair(first):
            raise first
        said = [
            f"rank {rank} {_outcome(call, error)}"
            for rank, (call, error) in enumerate(zip(calls, errors, strict=True))
        ]
        raise self._lose(f"{method}: {', '.join(said)}") from first


async def _ended(calls: list[asyncio.Task[Any]]) -> None:
    """Until all calls have ended, or for the time of grace after one has failed."""
    _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
    if waiting:
        await asyncio.wait(waiting, timeout=GRACE_SECONDS)


def _look_at(call: asyncio.Task[Any]) -> None:
    if not call.cancelled():
        call.exception()


def _is_beyond_repair(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _BEYOND_REPAIR)


def _outcome(call: asyncio.Task[Any], error: BaseException | None) -> str:
    if error is not None:
        return f"failed with {type(error).__name__}: {error}"
    return "succeeded" if call.done() else "didn't answer"
