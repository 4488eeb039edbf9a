"""Results for whoever asks: as they were computed, or as they are sent."""

from __future__ import annotations

from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.records import as_computed, as_encoded
from twinkle.server.scheduling.scheduler import Scheduler


class Results:
    """Single-threaded: called on one event loop."""

    def __init__(self, futures: FutureTable, scheduler: Scheduler) -> None:
        self._futures = futures
        self._scheduler = scheduler

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.TryAgain:
        """As `Service.retrieve`."""
        outcome = await self._futures.wait(tenant, request_id, timeout)
        return self._pending(request_id) if outcome is None else as_computed(outcome)

    async def fetch(
        self, tenant: str, request_id: str, timeout: float, most_bytes: int | None
    ) -> Encoded | m.TryAgain | m.CompleteMetadata:
        """As `Service.fetch`."""
        outcome = await self._futures.look(tenant, request_id, timeout)
        if outcome is None:
            return self._pending(request_id)
        encoded = as_encoded(outcome)
        if most_bytes is not None and len(encoded.body) > most_bytes:
            return m.CompleteMetadata(response_payload_size=len(encoded.body))
        self._futures.fetched(request_id)
        return encoded

    def _pending(self, request_id: str) -> m.TryAgain:
        run = self._futures.run_of(request_id)
        reason = None
        if run is not None and not run.has_ended:
            tenants = len(self._scheduler.ready_tenants)
            reason = f"{run.queue.why_waiting(request_id)}; {tenants} tenants have requests ready"
        return m.TryAgain(request_id=request_id, queue_state_reason=reason)
