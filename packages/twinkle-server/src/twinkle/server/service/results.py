"""Results for whoever asks: as they were computed, or as they travel; large ones are encoded off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from twinkle.protocol import messages as m
from twinkle.protocol.results import Encoded, decode_result, encode_result
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle.server.scheduling.futures import LARGE_BYTES, FutureTable, memory_of
from twinkle.server.scheduling.scheduler import Scheduler

T = TypeVar("T")


class Results:
    """Single-threaded: called on one event loop."""

    def __init__(self, futures: FutureTable, scheduler: Scheduler) -> None:
        self._futures = futures
        self._scheduler = scheduler

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.Pending:
        """As `Service.retrieve`."""
        outcome = await self._futures.wait(tenant, request_id, timeout)
        if isinstance(outcome, Encoded):
            encoded = outcome
            return await _off_loop(len(encoded.body), lambda: decode_result(encoded))
        return self._pending(request_id) if outcome is None else outcome

    async def fetch(
        self, tenant: str, request_id: str, timeout: float, most_bytes: int | None
    ) -> Encoded | m.Result | m.Failure | m.Pending | m.CompleteMetadata:
        """As `Service.fetch`."""
        outcome = await self._futures.look(tenant, request_id, timeout)
        if outcome is None:
            return self._pending(request_id)
        if isinstance(outcome, ForwardBackwardOutput | SampleResponse):
            result = outcome
            outcome = await _off_loop(memory_of(result), lambda: encode_result(result))
            self._futures.replace(request_id, outcome)
        if isinstance(outcome, Encoded) and most_bytes is not None and len(outcome.body) > most_bytes:
            return m.CompleteMetadata(response_payload_size=len(outcome.body))
        self._futures.fetched(request_id)
        return outcome

    def _pending(self, request_id: str) -> m.Pending:
        run = self._futures.run_of(request_id)
        reason = None
        if run is not None and not run.has_ended:
            reason = self._scheduler.why_waiting(run, request_id)
        return m.Pending(request_id=request_id, queue_state_reason=reason)


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if size > LARGE_BYTES else work()
