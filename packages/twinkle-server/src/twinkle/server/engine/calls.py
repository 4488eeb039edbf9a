"""What goes to the worker as one call, which call is next, and what becomes of a failed one.

While the worker computes a call, the next one may be dispatched behind it, so that the worker doesn't idle in between.
That is done late in the call: a job that arrives after it has to wait for another call.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, StepOutcome
from twinkle.server.engine.packing import Packed
from twinkle.server.engine.worker import Trained
from twinkle.server.scheduling.records import StepRefused
from twinkle.server.scheduling.runs import Job, Run, RunState
from twinkle.server.scheduling.scheduler import Tick

log = logging.getLogger("twinkle.engine")

# The share of a call's estimated time after which the next one may be dispatched.
DISPATCH_AT = 0.8
# A call that takes longer is logged.
SLOW_SECONDS = 30.0
# The weight of the latest call in the mean time per token.
_WEIGHT = 0.3
# A repeated call is given up once the worker was lost during it this often.
_MAX_LOSSES = 3


@dataclass(frozen=True, eq=False)
class Call:
    """Jobs that go to the worker together: passes, optimizer steps, passes and the steps after them, or one other job.

    Attributes:
        is_repeat: it was computed before, and no snapshot includes it. (Its outcomes are known, except for some that an
            earlier process could not write.)
        was_lost: the worker was lost during it; it has a single job.
    """

    passes: tuple[Job, ...] = ()
    optim_steps: tuple[Job, ...] = ()
    other: Job | None = None
    is_repeat: bool = False
    was_lost: bool = False

    @classmethod
    def of(cls, jobs: Iterable[Job], is_repeat: bool = False, was_lost: bool = False) -> Call:
        tick = Tick.of(jobs)
        [other] = tick.others or (None,)
        return cls(tick.passes, tick.optim_steps, other, is_repeat, was_lost)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.passes, *self.optim_steps, *((self.other,) if self.other else ()))

    @property
    def only_job(self) -> Job:
        """The job of a call that has one."""
        [job] = self.jobs
        return job

    @property
    def runs(self) -> dict[Run, None]:
        """Each run once, in the order of their jobs."""
        return dict.fromkeys(job.run for job in self.jobs)

    def singles(self, was_lost: bool = False) -> list[Call]:
        """One call for each job."""
        return [Call.of([job], self.is_repeat, was_lost) for job in self.jobs]

    def smaller(self) -> list[Call]:
        """What is tried after it failed as a whole without changing anything: each pass alone, then all steps together;
        without passes, each job alone.
        """
        if self.passes and self.optim_steps:
            return [*replace(self, optim_steps=()).singles(), replace(self, passes=())]
        return self.singles()


def calls_of(tick: Tick) -> list[Call]:
    """A tick's calls: passes and steps in one, then each other job."""
    others = [Call(other=job) for job in tick.others]
    return [Call(tick.passes, tick.optim_steps), *others] if tick.passes or tick.optim_steps else others


class CallQueue:
    """The calls to make: repeated ones, then the tick's. Single-threaded."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._losses: Counter[Job] = Counter()  # how often the worker was lost while repeating each job

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def first(self) -> Call | None:
        return self._calls[0] if self._calls else None

    def add(self, calls: Iterable[Call]) -> None:
        self._calls.extend(calls)

    def repeat(self, calls: Iterable[tuple[Job, ...]]) -> None:
        """Make these calls again, before all others."""
        repeats = [Call.of(jobs, is_repeat=True) for jobs in calls]
        if repeats:
            log.info("%d calls are made again, which no snapshot of their runs has", len(repeats))
        self._calls.extendleft(reversed(repeats))

    def replace_first(self, calls: Iterable[Call]) -> None:
        """Replace the first call, which was made or tried, by what is left of it."""
        self._calls.popleft()
        self._calls.extendleft(reversed(list(calls)))
        if not self._calls or not self._calls[0].is_repeat:
            self._losses.clear()

    def skip_lost_runs(self) -> list[Job]:
        """Take the jobs of lost runs out of the repeated calls at the front; returns them."""
        skipped: list[Job] = []
        while self._calls and self._calls[0].is_repeat:
            jobs = self._calls[0].jobs
            kept = [job for job in jobs if job.run.state is not RunState.LOST]
            if len(kept) == len(jobs):
                break
            skipped += (job for job in jobs if job.run.state is RunState.LOST)
            self._calls.popleft()
            if kept:
                self._calls.appendleft(Call.of(kept, is_repeat=True))
        return skipped

    def is_too_much(self, call: Call) -> bool:
        """Count a loss of the worker during a repeated call; returns whether there were too many."""
        jobs = call.jobs
        self._losses.update(jobs)
        if self._losses[jobs[0]] < _MAX_LOSSES:
            return False
        for job in jobs:
            del self._losses[job]
        return True

    def take_all(self) -> list[Job]:
        """Take out the jobs of all calls."""
        jobs = [job for call in self._calls for job in call.jobs]
        self._calls.clear()
        return jobs


@dataclass(frozen=True, eq=False)
class InFlightCall:
    """A call with passes and steps that the worker is computing, or will compute next.

    Attributes:
        sent_at: when it was dispatched, in the event loop's time, in seconds.
        cost: of its passes, in tokens.
    """

    call: Call
    packed: Packed
    result: asyncio.Task[Trained]
    sent_at: float
    cost: int

    def drop(self) -> None:
        """Stop waiting for its result."""
        self.result.cancel()
        # Otherwise asyncio would warn about an exception that was never retrieved.
        self.result.add_done_callback(lambda done: done.cancelled() or done.exception())


class CallTimes:
    """Estimates when a call will be done, by an exponential mean of seconds per token."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None
        self._free_at = 0.0  # when the last call ended

    def ended(self, in_flight: InFlightCall, now: float) -> None:
        """A call has ended, computed since it was sent or since the call before it ended."""
        seconds = now - max(in_flight.sent_at, self._free_at)
        seconds_per_token = seconds / max(1, in_flight.cost)
        self._free_at = now
        if seconds > SLOW_SECONDS:
            log.info(
                "a slow tick: %d passes and %d optimizer steps of %d runs, %d tokens with padding, took %.0f s",
                len(in_flight.call.passes),
                len(in_flight.call.optim_steps),
                len(in_flight.call.runs),
                in_flight.cost,
                seconds,
            )
        if self._seconds_per_token is not None:
            seconds_per_token = _WEIGHT * seconds_per_token + (1 - _WEIGHT) * self._seconds_per_token
        self._seconds_per_token = seconds_per_token

    def late_at(self, in_flight: InFlightCall) -> float | None:
        """When most of the call will have been computed, in the event loop's time; None if nothing is known yet."""
        if self._seconds_per_token is None:
            return None
        begins = max(in_flight.sent_at, self._free_at)
        return begins + DISPATCH_AT * in_flight.cost * self._seconds_per_token


def pass_of(job: Job) -> m.ForwardBackwardRequest:
    """The request of a job that is a pass."""
    return cast(m.ForwardBackwardRequest, job.request)


def steps_of(jobs: Iterable[Job]) -> list[AdamStep]:
    """What the worker is asked for, by optimizer steps."""
    return [
        AdamStep(job.run.run_id, cast(m.OptimStepRequest, job.request).adam_params or AdamParams())
        for job in jobs
    ]


def step_result(outcome: StepOutcome) -> m.OptimStepResponse | m.Failure:
    """What the client of an optimizer step gets."""
    if isinstance(outcome, InvalidRequest):
        return StepRefused(error=outcome.message, category=outcome.category)
    return m.OptimStepResponse(metrics=outcome)
