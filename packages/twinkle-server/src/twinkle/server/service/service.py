"""The verbs for one base model, as the gateway and local mode call them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinkle.protocol import messages as m
from twinkle.protocol import operations
from twinkle.protocol.codec import Encoded, encode_result
from twinkle.protocol.errors import NotFound, ServerFault, Unavailable
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.scheduling.futures import Fetched
from twinkle.server.scheduling.records import as_computed
from twinkle.server.scheduling.runs import Received
from twinkle.server.service import (
    accounts,
    checkpoint_queries,
    metrics,
    queries,
    sampling,
    session_queries,
    training,
)
from twinkle.server.service.background import Background
from twinkle.server.service.parts import Answer, Parts, Submit
from twinkle.server.service.restore import adopt, restore
from twinkle.server.tokens import Download

log = logging.getLogger("twinkle.server")

# How long a stopping server waits for the current tick to end.
_STOP_SECONDS = 10.0

OPERATIONS: dict[type[m.Operation], Submit] = {**training.OPERATIONS, **sampling.OPERATIONS}
QUERIES: dict[type[m.Query[Any]], Answer] = {
    **queries.QUERIES,
    **session_queries.QUERIES,
    **sampling.QUERIES,
    **checkpoint_queries.QUERIES,
    **accounts.QUERIES,
}


class Service:
    """One base model's service: `submit` queues an operation, `retrieve` waits for its result, `ask` answers queries.

    Single-threaded: everything is called on one event loop, on which nothing computes or waits for a disk.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._background = Background(parts)
        self._loop_task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin to work; returns when a training step and a sample have succeeded."""
        worker = self.parts.worker
        self.parts.scheduler.set_batching_window(await warm_up(worker), worker.info.max_batch_tokens)
        await restore(self.parts)
        self._loop_task = asyncio.create_task(self.parts.engine.run())
        self._background.start()

    async def close(self) -> None:
        """Stop working; pending writes are finished, and what is under way goes on in the next process."""
        parts = self.parts
        is_idle = await self._stop_engine()
        await self._background.close()
        # Outcomes of saves are still journaled, since the runs' snapshots are taken after them. Samples stopped
        # from here on are drawn again by the next process.
        await parts.checkpoints.settle()
        parts.run_log.close()
        await parts.samples.close()
        # Between two calls, and with a journal, all runs are snapshotted: then nothing has to be computed again.
        is_kept = is_idle and not parts.engine.has_failed and parts.open_journal is not None
        await parts.snapshots.close(parts.live if is_kept else ())
        try:
            await parts.ledger.flush()
        except Exception:
            log.exception("what was used last could not be written")
        await parts.worker.close()
        parts.threads.close()
        parts.database.close()

    async def _stop_engine(self) -> bool:
        """Stop between two calls, if that is soon; returns whether it did."""
        if self._loop_task is None:
            return False
        is_idle = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await self.parts.engine.until_idle()
                is_idle = True
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        return is_idle

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if it can't work any more. (A lost worker that is being restarted doesn't count.)
        """
        if self._loop_task is None or self._loop_task.done():
            raise RuntimeError("the engine's loop has ended")
        if self.parts.engine.has_failed:
            raise RuntimeError("the model could not be restarted")

    async def ready(self) -> None:
        """
        Raises:
            Unavailable: if a request would have to wait now: the model is being loaded, or warmed up, or its process
                has ended.
        """
        if self._loop_task is None:
            raise Unavailable("the model is not ready yet: a training step and a sample come first", 2.0)
        try:
            self.check()
            async with asyncio.timeout(0):  # what is ready returns at once
                await self.parts.worker.available()
        except (RuntimeError, ServerFault) as error:
            raise Unavailable(
                "the model's process ended or hung, and could not be restarted", 30.0
            ) from error
        except TimeoutError as error:
            raise Unavailable("the model's process ended or hung, and is being restarted", 2.0) from error

    async def metrics(self) -> str:
        """What it does, in Prometheus' text format."""
        return metrics.render(self.parts)

    async def adopt(self, directory: Path) -> int:
        """Take over the runs of another engine of this model, which has ended: see `restore.adopt`."""
        return await adopt(self.parts, directory)

    # ------------------------------------------------------------ operations and their results

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise:
        """Accept an operation.

        Args:
            body: the bytes it was decoded from, for the journal; None if there are none.
            digest: from `operations.digest`. Default: made here; an empty one means that the request is never retried.

        Raises:
            InvalidRequest, NotFound: if it can't be done; its `seq_id` is consumed.
            QuotaReached: if there would be too many runs.
            LimitReached, Unavailable: if it can't be accepted now; it may be sent again.
        """
        received = Received(request, body, operations.digest(request) if digest is None else digest)
        promise = await OPERATIONS[type(request)](self.parts, tenant, request, received)
        if (journal := self.parts.run_log.journal) is not None:
            await journal.wait_durable()
        return promise

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.TryAgain:
        """The result, or `TryAgain` after `timeout` seconds without one."""
        futures = self.parts.futures
        with self.parts.leases.waiting(futures.sessions_of(tenant, [request_id])):
            outcome = await futures.wait(tenant, request_id, timeout)
        return self._try_again(request_id) if outcome is None else as_computed(outcome)

    async def fetch(
        self, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None = None
    ) -> list[Fetched]:
        """As `retrieve` for several, encoded as they are sent: returns once all are there.

        Args:
            most_bytes: for larger results only the size is returned; they don't count as fetched.
        """
        futures = self.parts.futures
        with self.parts.leases.waiting(futures.sessions_of(tenant, request_ids)):
            outcomes = await futures.look(tenant, request_ids, timeout)
        replies: list[Fetched] = []
        for request_id, outcome in zip(request_ids, outcomes, strict=True):
            if outcome is None:
                replies.append(self._try_again(request_id))
            elif isinstance(outcome, NotFound):
                replies.append(outcome)
            else:
                encoded = outcome if isinstance(outcome, Encoded) else encode_result(outcome)
                size = len(encoded.body)
                is_large = most_bytes is not None and size > most_bytes
                replies.append(m.CompleteMetadata(response_payload_size=size) if is_large else encoded)
        pairs = zip(request_ids, replies, strict=True)
        futures.fetched([request_id for request_id, reply in pairs if isinstance(reply, Encoded)])
        return replies

    def _try_again(self, request_id: str) -> m.TryAgain:
        run = self.parts.futures.run_of(request_id)
        reason = None
        if run is not None and not run.has_ended:
            tenants = len(self.parts.scheduler.ready_tenants)
            reason = f"{run.queue.why_waiting(request_id)}; {tenants} tenants have requests ready"
        return m.TryAgain(request_id=request_id, queue_state_reason=reason)

    # ------------------------------------------------------------ queries and downloads

    async def ask(self, tenant: str, query: m.Query[Any]) -> Any:
        """Answer a query.

        Raises:
            InvalidRequest, NotFound, Gone: as appropriate.
        """
        return await QUERIES[type(query)](self.parts, tenant, query)

    async def download_sizes(self, download: Download) -> dict[str, int]:
        """The files in a download, with their sizes in bytes.

        Raises:
            NotFound: if they are not there (any more).
        """
        parts = self.parts
        return await parts.threads.downloads.run(download.tenant, lambda: parts.downloads.sizes(download))

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of one of those files."""
        parts = self.parts
        return await parts.threads.downloads.run(
            download.tenant, lambda: parts.downloads.read(download, name, offset, size)
        )
