"""Restores what an earlier process knew, from its journal and its run snapshots.

Every run that had not ended accepts requests again, except those with gaps in their order, which are lost. What was
accepted and has no outcome is queued again; what was computed after a run's snapshot is computed again, in the same
calls; known results can be fetched.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import Accepted, Begun, Done, Ended, Lost, Outcome, Record, Rejected
from twinkle.server.scheduling.runs import Job, LostRun, Run, RunQueue, RunRequest, RunState
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.store.retry import retry_while_unavailable
from twinkle.server.store.run_files import RunFiles

log = logging.getLogger("twinkle.server")

LossOf: TypeAlias = Callable[[Run, m.ForwardBackwardRequest], Awaitable[CustomLoss | None]]

_LOST = (
    "the state of this run is lost: the server ended before the checkpoint that had been loaded into it was kept, for "
    "want of room on its disk; begin a new run from the checkpoint"
)
_RESULT_LOST = (
    "this request was done before the server ended, and its result was lost, for want of room on the disk of the "
    "server's storage.root"
)
_RUN_ENDED = "model_id: run {} has ended"
_HOLE = (
    "model_id: run {} is lost: the server's record of what it had accepted was damaged on its disk, and {}; begin a "
    "new run from its last checkpoint"
)


@dataclass
class Found:
    """What a journal says.

    Attributes:
        runs: those that have not ended.
        accepted: by request id, the first complete record of each.
        outcomes: by request id.
        calls: request ids of what was computed together, in order.
        ended: runs that have.
        lost: runs that an earlier process could not recover.
        is_damaged: records may be missing.
    """

    runs: dict[str, Begun] = field(default_factory=dict[str, Begun])
    accepted: dict[str, Accepted] = field(default_factory=dict[str, Accepted])
    rejected: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    outcomes: dict[str, Encoded] = field(default_factory=dict[str, Encoded])
    calls: list[list[str]] = field(default_factory=list[list[str]])
    ended: set[str] = field(default_factory=set[str])
    lost: dict[str, LostRun] = field(default_factory=dict[str, LostRun])
    is_damaged: bool = False

    def add(self, record: Record) -> None:
        match record:
            case Begun(run_id=run_id):
                self.runs[run_id] = record
            case Accepted(request_id=request_id):
                known = self.accepted.get(request_id)
                if known is None or known.body is None:
                    self.accepted[request_id] = record
            case Rejected(run_id, seq_id):
                self.rejected.setdefault(run_id, set()).add(seq_id)
            case Done(outcomes):
                new = [outcome for outcome in outcomes if outcome[0] not in self.outcomes]
                self.outcomes |= {request_id: Encoded(kind, body) for request_id, kind, body in new}
                self.calls.append([request_id for request_id, _, _ in new])
            case Ended(run_id):
                self.runs.pop(run_id, None)
                self.ended.add(run_id)
            case Lost(run):
                self.lost[run.run_id] = run

    def may_have_changed(self, request_id: str) -> bool:
        """Whether a request with this outcome may have changed its run."""
        outcome = self.outcomes.get(request_id)
        return outcome is not None and outcome.kind != m.Failure.__name__  # a `StepRefused` has


@dataclass(frozen=True, eq=False)
class Restore:
    """Restores into these parts. Called on their event loop, before they get any request."""

    live: LiveRuns
    scheduler: Scheduler
    futures: FutureTable
    files: RunFiles

    async def apply(self, found: Found, loss_of: LossOf) -> list[tuple[Job, ...]]:
        """Returns the calls to make again, in order.

        Args:
            loss_of: the custom loss of a pass, if it names one.
        """
        by_run: dict[str, dict[int, Accepted]] = {}
        for record in found.accepted.values():
            if record.run_id is not None:
                by_run.setdefault(record.run_id, {})[record.seq_id] = record
        stored = {
            run_id: await retry_while_unavailable(partial(self._stored, run_id)) for run_id in found.runs
        }
        self._tell_lost(found, by_run, stored)
        runs = {
            run_id: _make_run(begun, by_run.get(run_id, {}), found, stored[run_id])
            for run_id, begun in found.runs.items()
        }
        for record in found.accepted.values():
            run, outcome = runs.get(record.run_id or ""), found.outcomes.get(record.request_id)
            if record.run_id is None and outcome is None:
                continue  # `service.restore`, which knows its session, begins it again
            session_id = run.session_id if run is not None else ""
            self.futures.create(record.request_id, record.tenant, session_id, run, record.tokens)
            if outcome is not None:
                self.futures.restore(record.request_id, outcome)
            elif record.run_id in self.live.lost:
                self._fail(record, self.live.lost[record.run_id].reason, "server")
            elif record.run_id is not None and run is None:
                self._fail(record, _RUN_ENDED.format(record.run_id), "user")
        again = {
            run: await self._apply_run(run, by_run.get(run_id, {}), found, loss_of)
            for run_id, run in runs.items()
        }
        return list(in_order(found.calls, again))

    def _stored(self, run_id: str) -> int | None:
        """The run's newest usable snapshot."""
        numbers = self.files.numbers(run_id)
        while len(numbers) > 1 and not self.files.is_whole(run_id, numbers[-1]):
            # What the older one lacks is computed again, if it is known.
            self.files.delete(run_id, numbers.pop())
        return numbers[-1] if numbers else None

    def _tell_lost(
        self, found: Found, by_run: dict[str, dict[int, Accepted]], stored: dict[str, int | None]
    ) -> None:
        """Move the runs that can't go on out of `found`, to the lost ones."""
        lost = self.live.lost
        lost.update(found.lost)
        for run in list(found.runs.values()):
            accepted = by_run.get(run.run_id, {})
            number = stored[run.run_id]
            if not accepted and number is None:
                del found.runs[run.run_id]  # no client ever heard of it
                continue
            # A record without its body was in a snapshot.
            known = {seq_id for seq_id, record in accepted.items() if record.body or seq_id <= (number or 0)}
            known.update(found.rejected.get(run.run_id, ()))
            missing = _first_missing(accepted, known, number, found)
            if missing is not None and run.run_id not in lost:
                reason = _HOLE.format(run.run_id, f"its request {missing} is missing")
                lost[run.run_id] = LostRun(run.run_id, run.tenant, reason)
        for run_id, accepted in by_run.items():
            some = next(iter(accepted.values()))
            is_unknown = run_id not in found.runs and run_id not in found.ended and run_id not in lost
            # The end of a run is always written after what the run did.
            if is_unknown and any(record.body for record in accepted.values()):
                reason = _HOLE.format(run_id, "its beginning is missing")
                lost[run_id] = LostRun(run_id, some.tenant, reason)
        for run_id in lost:
            found.runs.pop(run_id, None)
            if run_id not in found.lost:
                log.error("%s", lost[run_id].reason)

    async def _apply_run(
        self, run: Run, accepted: dict[int, Accepted], found: Found, loss_of: LossOf
    ) -> deque[Job]:
        """Restore one run; returns the jobs to do before anything else on it, in order.

        These are what was computed after its snapshot, and what had no outcome though later requests had one: saves are
        written in the background, and while a disk is full no outcomes are written.
        """
        again: deque[Job] = deque()
        stored, last = run.snapshot.stored or 0, run.queue.next_id - 1
        self.live.restore(run)
        for seq_id in sorted({*accepted, *found.rejected.get(run.run_id, ())}):
            record = accepted.get(seq_id)
            if record is None:
                self.scheduler.reject(run, seq_id)
                continue
            kind: type[RunRequest] = record.kind  # pyright: ignore[reportAssignmentType]
            run.queue.remember(seq_id, record.request_id, kind, record.digest)
            if seq_id > last:
                if record.body is not None:
                    self.scheduler.submit(await _job(run, record, loss_of))
            elif seq_id <= stored:
                if record.request_id not in found.outcomes:
                    self.futures.restore(record.request_id, _outcome_of(record))
            elif record.request_id not in found.outcomes:
                again.append(await _job(run, record, loss_of))
            elif found.may_have_changed(record.request_id):
                again.extend(await _computed(run, record, loss_of))
        return again

    def _fail(self, record: Accepted, error: str, category: str) -> None:
        failure = m.Failure(error=error, category=category)  # pyright: ignore[reportArgumentType]
        self.futures.restore(record.request_id, failure)


def _make_run(begun: Begun, accepted: dict[int, Accepted], found: Found, stored: int | None) -> Run:
    """The run after the last of its requests that has an outcome, or that its snapshot includes."""
    done = [seq_id for seq_id, record in accepted.items() if record.request_id in found.outcomes]
    # If no request has an outcome, its adapter was never made, or is made again.
    last = max([*done, stored or 0]) if done or stored is not None else -1
    # Earlier versions recorded the model as their configuration spelled it.
    base_model, queue = plain_name(begun.base_model), RunQueue(last + 1)
    run = Run(begun.run_id, begun.tenant, begun.session_id, base_model, begun.spec, queue)
    if last >= 0:
        run.state, run.changed, run.snapshot.stored = RunState.EVICTED, stored or 0, stored
    return run


async def _computed(run: Run, record: Accepted, loss_of: LossOf) -> list[Job]:
    """What has to be computed again of a request with a known outcome: nothing, or the job."""
    if record.kind is m.LoadWeightsRequest:
        run.state, run.lost = RunState.LOST, _LOST
    if record.kind not in (m.OptimStepRequest, m.ForwardBackwardRequest):
        return []
    job = await _job(run, record, loss_of)
    is_forward_only = isinstance(job.request, m.ForwardBackwardRequest) and job.request.forward_only
    return [] if is_forward_only else [job]


async def _job(run: Run, record: Accepted, loss_of: LossOf) -> Job:
    request: RunRequest = record.request()  # pyright: ignore[reportAssignmentType]
    loss = await loss_of(run, request) if isinstance(request, m.ForwardBackwardRequest) else None
    return Job(record.request_id, run, record.seq_id, request, record.tokens, loss, record.digest)


def _first_missing(
    accepted: dict[int, Accepted], known: set[int], stored: int | None, found: Found
) -> int | None:
    """The first request after a run's snapshot of which nothing is known, although it must have existed.

    Jobs are done in order, so nothing before the last done one may be missing. What comes after it may simply not have
    arrived; but if records are missing, its client may have been told that it was accepted.
    """
    done = [seq_id for seq_id, record in accepted.items() if record.request_id in found.outcomes]
    last = max(known if found.is_damaged else done, default=-1)
    first = 0 if stored is None else stored + 1
    return next((seq_id for seq_id in range(first, last + 1) if seq_id not in known), None)


def _outcome_of(record: Accepted) -> Outcome:
    """The outcome of a request that the run's snapshot includes, but whose own was never written."""
    if record.kind is m.CreateModelRequest:
        return m.CreateModelResponse(model_id=record.run_id or "")
    if record.kind is m.LoadWeightsRequest and record.body is not None:
        request = record.request()
        assert isinstance(request, m.LoadWeightsRequest)
        return m.LoadWeightsResponse(path=request.path, model_id=record.run_id or "")
    return m.Failure(error=_RESULT_LOST, category="server")


def in_order(calls: Iterable[list[str]], again: dict[Run, deque[Job]]) -> Iterable[tuple[Job, ...]]:
    """The calls to make again, each with those of its jobs that are to be done again.

    The journal has calls in the order in which their outcomes were written. A run's jobs keep their own order: one
    whose outcome was written late, or not at all, is done alone before those it preceded.

    Args:
        calls: request ids of what was computed together.
        again: by run, its jobs in order; used up.
    """
    by_id = {job.request_id: job for jobs in again.values() for job in jobs}
    for call in calls:
        jobs = tuple(by_id[request_id] for request_id in call if request_id in by_id)
        for job in jobs:
            waiting = again[job.run]
            while waiting[0].seq_id < job.seq_id and waiting[0].request_id not in call:
                yield (_take(waiting, by_id),)
            _take(waiting, by_id)
        if jobs:
            yield jobs
    for waiting in again.values():
        while waiting:
            yield (_take(waiting, by_id),)


def _take(waiting: deque[Job], by_id: dict[str, Job]) -> Job:
    job = waiting.popleft()
    del by_id[job.request_id]
    return job
