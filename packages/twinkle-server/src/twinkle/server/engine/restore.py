"""What an earlier process knew, from its journal and its copies of the runs.

Every run that had not ended takes requests again. What was accepted and has no outcome is queued again; what was
computed behind a run's copy is to be computed again, in the same calls; results that were known can be fetched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from twinkle.protocol import messages as m
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.engine import records
from twinkle.server.engine.failures import StepRefused
from twinkle.server.engine.records import Accepted, Begun, Done, Ended, Record, Rejected
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.run_files import RunFiles
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.scheduling.futures import FutureTable, Outcome
from twinkle.server.scheduling.jobs import Job, RunRequest
from twinkle.server.scheduling.scheduler import Scheduler

_LOST = (
    "the state of this run is lost: the server ended before the checkpoint that had been loaded into it was kept, for "
    "want of room on its disk; begin a new run from the checkpoint"
)
_RESULT_LOST = (
    "this request was done before the server ended, and its result was lost, for want of room on the disk of the "
    "server's storage.root"
)
_RUN_ENDED = "model_id: run {} has ended"


@dataclass
class Found:
    """What a journal says.

    Attributes:
        runs: those that have not ended.
        accepted: by request id, the first time that it is there whole.
        outcomes: by request id.
        calls: request ids of what was computed together, in order.
    """

    runs: dict[str, LiveRun] = field(default_factory=dict[str, LiveRun])
    accepted: dict[str, Accepted] = field(default_factory=dict[str, Accepted])
    rejected: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    calls: list[list[str]] = field(default_factory=list[list[str]])

    def add(self, record: Record) -> None:
        match record:
            case Begun(run):
                self.runs[run.run_id] = run
            case Accepted(request_id=request_id):
                known = self.accepted.get(request_id)
                if known is None or known.body is None:
                    self.accepted[request_id] = record
            case Rejected(run_id, seq_id):
                self.rejected.setdefault(run_id, set()).add(seq_id)
            case Done(outcomes):
                new = [outcome for outcome in outcomes if outcome[0] not in self.outcomes]
                self.outcomes |= {
                    request_id: records.decode_outcome(kind, body) for request_id, kind, body in new
                }
                self.calls.append([request_id for request_id, _, _ in new])
            case Ended(run_id):
                self.runs.pop(run_id, None)

    def may_have_changed(self, request_id: str) -> bool:
        """Whether a request with this outcome can have changed its run."""
        outcome = self.outcomes.get(request_id)
        return outcome is not None and (
            not isinstance(outcome, m.Failure) or isinstance(outcome, StepRefused)
        )


@dataclass(frozen=True, eq=False)
class Restore:
    """Where it all goes. Called on the event loop of these, before anything else is asked of them.

    Attributes:
        loss_of: the custom loss of a pass, if it names one.
    """

    runs: dict[str, LiveRun]
    scheduler: Scheduler
    futures: FutureTable
    snapshots: Snapshots
    residency: Residency
    files: RunFiles
    loss_of: Callable[[LiveRun, m.ForwardBackwardRequest], Awaitable[CustomLoss | None]]

    async def apply(self, found: Found) -> list[list[Job]]:
        """Returns the calls that are to be made again, in order."""
        by_run: dict[str, dict[int, Accepted]] = {}
        for record in found.accepted.values():
            self.futures.create(record.tenant, record.run_id, record.request_id, record.tokens)
            if (outcome := found.outcomes.get(record.request_id)) is not None:
                self.futures.restore(record.request_id, outcome)
            elif record.run_id is not None and record.run_id not in found.runs:
                self._fail(record, _RUN_ENDED.format(record.run_id), "user")
            if record.run_id in found.runs:
                by_run.setdefault(record.run_id, {})[record.seq_id] = record
        again = {
            run.run_id: await self._apply_run(run, by_run.get(run.run_id, {}), found)
            for run in list(found.runs.values())
        }
        return list(in_order(found.calls, again))

    async def _apply_run(self, run: LiveRun, accepted: dict[int, Accepted], found: Found) -> deque[Job]:
        """Bring back one run; returns what is to be done again before anything else is done of it, in order.

        That is what was computed behind its copy, and what had no outcome though later requests had one: saves are
        written behind, and while a disk is full outcomes aren't written.
        """
        again: deque[Job] = deque()
        run_id = run.run_id
        done = [seq_id for seq_id, record in accepted.items() if record.request_id in found.outcomes]
        numbers = self.files.numbers(run_id)
        stored = numbers[-1] if numbers else None
        # Without an outcome of any request its adapter was not made, or is made once more.
        last = max([*done, stored or 0]) if done else -1
        self.runs[run_id] = run
        if last >= 0:
            self.snapshots.begin(run, stored)
            self.residency.begin_evicted(run_id)
        queue = self.scheduler.add_run(run_id, first_seq_id=last + 1)
        for seq_id in sorted({*accepted, *found.rejected.get(run_id, ())}):
            record = accepted.get(seq_id)
            if record is None:
                self.scheduler.reject(run_id, run.tenant, seq_id)
                continue
            queue.remember(seq_id, record.request_id, record.kind)  # pyright: ignore[reportArgumentType]
            if seq_id > last:
                if record.body is not None:
                    self.scheduler.submit(await self._job(run, record))
            elif seq_id <= (stored or 0):
                if record.request_id not in found.outcomes:
                    self.futures.restore(record.request_id, _outcome_of(record))
            elif record.request_id not in found.outcomes:
                again.append(await self._job(run, record))
            elif found.may_have_changed(record.request_id):
                again.extend(await self._computed(run, record))
        return again

    async def _computed(self, run: LiveRun, record: Accepted) -> list[Job]:
        """What of a request whose outcome is known is to be computed again: nothing, or the job."""
        if record.kind is m.LoadWeightsRequest:
            self.snapshots.give_up(run.run_id, _LOST)
        if record.kind not in (m.OptimStepRequest, m.ForwardBackwardRequest):
            return []
        job = await self._job(run, record)
        is_forward_only = isinstance(job.request, m.ForwardBackwardRequest) and job.request.forward_only
        return [] if is_forward_only else [job]

    async def _job(self, run: LiveRun, record: Accepted) -> Job:
        request: RunRequest = record.request()  # pyright: ignore[reportAssignmentType]
        loss = await self.loss_of(run, request) if isinstance(request, m.ForwardBackwardRequest) else None
        return Job(record.request_id, record.tenant, run.run_id, record.seq_id, request, record.tokens, loss)

    def _fail(self, record: Accepted, error: str, category: str) -> None:
        failure = m.Failure(error=error, category=category)  # pyright: ignore[reportArgumentType]
        self.futures.restore(record.request_id, failure)


def _outcome_of(record: Accepted) -> Outcome:
    """Of a request that the run's copy has, whose outcome was not written any more."""
    if record.kind is m.CreateModelRequest:
        return m.CreateModelResponse(model_id=record.run_id or "")
    if record.kind is m.LoadWeightsRequest and record.body is not None:
        request = record.request()
        assert isinstance(request, m.LoadWeightsRequest)
        return m.LoadWeightsResponse(path=request.path, model_id=record.run_id or "")
    return m.Failure(error=_RESULT_LOST, category="server")


def in_order(calls: Iterable[list[str]], again: dict[str, deque[Job]]) -> Iterable[list[Job]]:
    """The calls that are to be made again, each with those of its jobs that are.

    The journal has calls in the order in which their outcomes were written. That of a run is its jobs' own: where one
    was written late, or not at all, the job goes alone before those that it went before.

    Args:
        calls: request ids of what was computed together.
        again: by run, its jobs in order; used up.
    """
    by_id = {job.request_id: job for jobs in again.values() for job in jobs}
    for call in calls:
        jobs = [by_id[request_id] for request_id in call if request_id in by_id]
        for job in jobs:
            waiting = again[job.run_id]
            while waiting[0].seq_id < job.seq_id and waiting[0].request_id not in call:
                yield [_take(waiting, by_id)]
            _take(waiting, by_id)
        if jobs:
            yield jobs
    for waiting in again.values():
        while waiting:
            yield [_take(waiting, by_id)]


def _take(waiting: deque[Job], by_id: dict[str, Job]) -> Job:
    job = waiting.popleft()
    del by_id[job.request_id]
    return job
