"""The runs that accept requests: how a run begins, what is queued on it, and how it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Gone, NotFound, Unavailable
from twinkle.protocol.operations import digest
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.logs import about
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.scheduling.records import RunLog
from twinkle.server.scheduling.runs import Job, LostRun, Received, Run, RunQueue, RunRequest, RunState
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.store.tables import RELEASED_NAME

log = logging.getLogger("twinkle.server")

# A client that was away resends everything within seconds; large requests may take longer.
STUCK_SECONDS = 120.0


class LiveRuns:
    """The runs by id, and what is left of lost ones. Single-threaded: called on one event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        futures: FutureTable,
        run_log: RunLog,
        tokens: RateLimit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tokens: rate limit charged for what is queued.
        """
        self._scheduler = scheduler
        self._futures = futures
        self._log = run_log
        self._tokens = tokens
        self._clock = clock
        self._runs: dict[str, Run] = {}
        self.lost: dict[str, LostRun] = {}
        """What is left of lost runs, by id."""
        self._restored: set[Run] = set()

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._runs

    def get(self, run_id: str | None) -> Run | None:
        return self._runs.get(run_id or "")

    def find(self, tenant: str, run_id: str | None) -> Run:
        """
        Raises:
            NotFound: if the tenant has no such run.
            Gone: if it is lost.
        """
        self.check_not_lost(tenant, run_id)
        run = self.get(run_id)
        if run is None or run.tenant != tenant:
            raise NotFound(
                f"model_id: no live run {(run_id or '')[:200]!r}; it never was, or has ended: begin one with "
                "create_model, or from a checkpoint with create_training_client_from_state (a run whose client was "
                f"away for too long was saved as {RELEASED_NAME!r}){self._futures.note}"
            )
        return run

    # ------------------------------------------------------------ begin and queue

    def begin(self, run: Run, received: Received) -> m.Promise:
        """
        Raises:
            Unavailable: if it can't be journaled; then there is no such run.
        """
        self._log.begun(run)
        self._runs[run.run_id] = run
        try:
            promise = self.enqueue(run, 0, received)
        except Unavailable:
            self.end(run)
            raise
        log.info(
            "a run begins", extra=about(run.run_id, run.tenant, rank=run.spec.rank, runs=len(self._runs))
        )
        return promise

    def restore(self, run: Run) -> None:
        """Let a run of an earlier process accept requests again."""
        self._runs[run.run_id] = run
        self._restored.add(run)

    def enqueue(
        self,
        run: Run,
        seq_id: int,
        received: Received,
        tokens: int = 0,
        loss: CustomLoss | None = None,
    ) -> m.Promise:
        """
        Raises:
            Unavailable: if it can't be journaled; then it is not queued.
        """
        request: RunRequest = received.request  # pyright: ignore[reportAssignmentType]
        request_id = self._log.accepted(run.tenant, run, seq_id, received, tokens)
        if tokens:
            self._tokens.charge(run.tenant, tokens)
        self._futures.create(request_id, run.tenant, run.session_id, run, tokens)
        self._scheduler.submit(Job(request_id, run, seq_id, request, tokens, loss, received.digest))
        return m.Promise(request_id=request_id, model_id=run.run_id)

    def enqueue_last(self, run: Run, request: m.SaveWeightsRequest | m.UnloadModelRequest) -> m.Promise:
        """Queue a request behind all others of the run, under the next free `seq_id` instead of its own."""
        for seq_id in self._scheduler.close_gaps(run):  # nobody is going to send what is missing
            self._log.rejected(run, seq_id)
        seq_id = run.queue.next_free
        request = request.model_copy(update={"seq_id": seq_id})
        return self.enqueue(run, seq_id, Received(request, digest=digest(request)))

    def reject(self, run: Run, seq_id: int) -> None:
        """Count a refused request's id as consumed."""
        self._scheduler.reject(run, seq_id)
        self._log.rejected(run, seq_id)

    # ------------------------------------------------------------ end

    def end(self, run: Run) -> None:
        """End the run: it accepts no more requests, and what it has queued fails."""
        if run.has_ended:
            return
        run.state = RunState.ENDED
        del self._runs[run.run_id]
        self._restored.discard(run)
        self._log.ended(run)
        log.info("a run ends", extra=about(run.run_id, run.tenant, runs=len(self._runs)))
        self._fail_queued(run, m.Failure(error=f"model_id: run {run.run_id} has ended", category="user"))

    def _fail_queued(self, run: Run, failure: m.Failure) -> None:
        for job in self._scheduler.remove(run):
            self._futures.complete(job.request_id, failure)

    # ------------------------------------------------------------ runs that can't go on

    def check_not_lost(self, tenant: str, run_id: str | None) -> None:
        """
        Raises:
            Gone: if the tenant's run is lost.
        """
        lost = self.lost.get(run_id or "")
        if lost is not None and lost.tenant == tenant:
            raise Gone(lost.reason)

    def lose(self, run: Run, reason: str) -> None:
        """The run can't go on: what it has queued, and all later requests to it, fail with this reason.

        Raises:
            Unavailable: if its end can't be journaled; it accepts nothing more, and ends with its session.
        """
        lost = LostRun(run.run_id, run.tenant, reason)
        self.lost[run.run_id] = lost
        self._log.lost(lost)
        log.error("a run is lost: %s", reason, extra=about(run.run_id, run.tenant))
        next_seq_id = run.queue.next_free
        self._fail_queued(run, m.Failure(error=reason, category="server"))
        run.queue = RunQueue(next_seq_id)
        self.enqueue_last(run, m.UnloadModelRequest(model_id=run.run_id))

    def forget_lost(self, session_id: str) -> None:
        """Forget the session's lost runs."""
        for run_id in [run.run_id for run in self.lost.values() if run.session_id == session_id]:
            del self.lost[run_id]

    def stuck(self) -> list[tuple[Run, int]]:
        """Runs that wait for a request that will never arrive, each with its `seq_id`; each is returned once.

        A request that was answered, but whose record was lost with a disk or in a power cut, is not sent again: its
        client goes on with the next one, which would wait forever. So a run restored from a journal waits for a missing
        request only for a limited time.
        """
        found: list[tuple[Run, int]] = []
        for run in list(self._restored):
            missing = run.queue.missing
            if missing is None:
                run.waits_since = None
            elif run.waits_since is None or run.waits_since[0] != missing:
                run.waits_since = missing, self._clock()
            elif self._clock() - run.waits_since[1] >= STUCK_SECONDS:
                found.append((run, missing))
                self._restored.discard(run)
        return found
