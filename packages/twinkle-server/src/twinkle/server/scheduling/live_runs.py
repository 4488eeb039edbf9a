"""The runs that take requests: how one begins, what is queued on it, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Gone, NotFound, Unavailable
from twinkle.protocol.operations import digest
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.engine.compaction import RunLog
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.runs import LiveRun, LostRun
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.scheduling.futures import FutureTable, new_request_id
from twinkle.server.scheduling.jobs import Job, Received, RunRequest
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.store.tables import RELEASED_NAME


class LiveRuns:
    """Single-threaded: everything is called on one event loop."""

    def __init__(
        self,
        runs: dict[str, LiveRun],
        lost: dict[str, LostRun],
        scheduler: Scheduler,
        futures: FutureTable,
        run_log: RunLog,
        snapshots: Snapshots,
        residency: Residency,
        tokens: RateLimit,
    ) -> None:
        """
        Args:
            runs: by id; others read it.
            lost: those that can't go on, by id.
            tokens: charged for what is queued.
        """
        self._runs = runs
        self._lost = lost
        self._scheduler = scheduler
        self._futures = futures
        self._log = run_log
        self._snapshots = snapshots
        self._residency = residency
        self._tokens = tokens

    def find(self, tenant: str, run_id: str | None) -> LiveRun:
        """
        Raises:
            NotFound: if the tenant has no such run.
            Gone: if it is lost.
        """
        self.check_not_lost(tenant, run_id)
        run = self._runs.get(run_id or "")
        if run is None or run.tenant != tenant:
            raise NotFound(
                f"model_id: no live run {(run_id or '')[:200]!r}; it never was, or has ended: begin one with "
                "create_model, or from a checkpoint with create_training_client_from_state (a run whose client was "
                f"away for too long was saved as {RELEASED_NAME!r}){self._futures.note}"
            )
        return run

    def check_not_lost(self, tenant: str, run_id: str | None) -> None:
        """
        Raises:
            Gone: if the tenant's run is lost.
        """
        lost = self._lost.get(run_id or "")
        if lost is not None and lost.tenant == tenant:
            raise Gone(lost.reason)

    def begin(self, run: LiveRun, received: Received) -> m.Promise:
        """
        Raises:
            Unavailable: if it can't be written down; then there is no such run.
        """
        self._log.begun(run)
        self._runs[run.run_id] = run
        self._scheduler.add_run(run.run_id)
        try:
            return self.enqueue(run, 0, received)
        except Unavailable:
            self.forget(run.run_id)
            raise

    def enqueue(
        self,
        run: LiveRun,
        seq_id: int,
        received: Received,
        tokens: int = 0,
        loss: CustomLoss | None = None,
    ) -> m.Promise:
        """
        Raises:
            Unavailable: if it can't be written down; then it is not queued.
        """
        request: RunRequest = received.request  # pyright: ignore[reportAssignmentType]
        job = Job(new_request_id(), run.tenant, run.run_id, seq_id, request, tokens, loss, received.digest)
        self._log.accepted(job, received.body)
        self._tokens.charge(run.tenant, tokens)
        self._futures.create(job.tenant, job.run_id, job.request_id, tokens)
        self._scheduler.submit(job)
        return m.Promise(request_id=job.request_id, model_id=run.run_id)

    def enqueue_last(self, run_id: str, make: Callable[[int], RunRequest]) -> m.Promise:
        """Queue a request, made for its `seq_id`, behind all others of the run."""
        queue = self._scheduler.queue(run_id)
        for seq_id in queue.close_gaps():  # nobody is going to send what is missing
            self._log.rejected(run_id, seq_id)
        seq_id = queue.next_free
        request = make(seq_id)
        return self.enqueue(self._runs[run_id], seq_id, Received(request, digest=digest(request)))

    def lose(self, run_id: str, reason: str) -> None:
        """The run can't go on: what it has queued fails for this reason, as does all that is asked of it later."""
        run = self._runs[run_id]
        self._lost[run_id] = LostRun(run_id, run.tenant, reason)
        self._log.lost(self._lost[run_id])
        first_seq_id = self._scheduler.queue(run_id).next_free
        for job in self._scheduler.remove_run(run_id, run.tenant):
            self._futures.complete(job.request_id, m.Failure(error=reason, category="server"))
        self._scheduler.add_run(run_id, first_seq_id)
        self.enqueue_last(run_id, lambda seq_id: m.UnloadModelRequest(model_id=run_id, seq_id=seq_id))

    def forget_lost(self, session_id: str) -> None:
        """Nobody asks any more for the lost runs of this session."""
        for run_id in [run.run_id for run in self._lost.values() if run.session_id == session_id]:
            del self._lost[run_id]

    def forget(self, run_id: str) -> None:
        """Take a run out of the scheduler; what it still had queued fails."""
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        self._log.ended(run_id)
        self._snapshots.forget(run_id)
        self._residency.forget(run_id)
        for job in self._scheduler.remove_run(run_id, run.tenant):
            failure = m.Failure(error=f"model_id: run {run_id} has ended", category="user")
            self._futures.complete(job.request_id, failure)
