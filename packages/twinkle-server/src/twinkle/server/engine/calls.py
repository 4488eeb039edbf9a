"""What goes to the worker as one call, which call is next, and what becomes of one that failed.

While the worker computes a call the next one may be dispatched behind it, so that it need not wait in between. That is
done late in the call: jobs that arrive after it wait for one call more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from twinkle.server.engine.packing import Packed
from twinkle.server.engine.worker import Trained
from twinkle.server.scheduling.runs import Job, Run, RunState
from twinkle.server.scheduling.scheduler import Tick

log = logging.getLogger("twinkle.engine")

# The share of a call after which the next one may be dispatched.
DISPATCH_AT = 0.8
# What the latest call counts for in the mean time a token takes.
_WEIGHT = 0.3
# A repeated call during which the worker was lost so often is given up.
_MAX_LOSSES = 3


@dataclass(frozen=True, eq=False)
class Call:
    """Jobs that go to the worker as one: passes, optimizer steps, passes and the steps behind them, or one other job.

    Attributes:
        is_repeat: it was computed before, and no snapshot has what it changed. (Its outcomes are known, but for some
            that an earlier process could not write down.)
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
        """Of a call with a single one."""
        [job] = self.jobs
        return job

    @property
    def runs(self) -> dict[Run, None]:
        """Each once, in the order of their jobs."""
        return dict.fromkeys(job.run for job in self.jobs)

    def singles(self, was_lost: bool = False) -> list[Call]:
        """A call for each job."""
        return [Call.of([job], self.is_repeat, was_lost) for job in self.jobs]

    def smaller(self) -> list[Call]:
        """What is tried once it has failed as a whole, and changed nothing: each pass alone, the steps together behind
        them; without passes each job alone.
        """
        if self.passes and self.optim_steps:
            steps = Call(optim_steps=self.optim_steps, is_repeat=self.is_repeat)
            return [*Call(self.passes, is_repeat=self.is_repeat).singles(), steps]
        return self.singles()


def calls_of(tick: Tick) -> list[Call]:
    """The calls of a tick: passes and steps in one, then each other job."""
    others = [Call(other=job) for job in tick.others]
    return [Call(tick.passes, tick.optim_steps), *others] if tick.passes or tick.optim_steps else others


class CallQueue:
    """The calls that are to be made: those to be repeated, then those of the tick. Single-threaded."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._losses: Counter[Job] = Counter()  # how often the worker was lost while a job was repeated

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
        """The first call has been made, or tried: these are left of it."""
        self._calls.popleft()
        self._calls.extendleft(reversed(list(calls)))
        if not self._calls or not self._calls[0].is_repeat:
            self._losses.clear()

    def skip_lost_runs(self) -> list[Job]:
        """Take jobs of runs that are lost out of the first calls that are repeated; returns them."""
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
        """The worker was lost during a repeated call: whether that has been so too often."""
        jobs = call.jobs
        self._losses.update(jobs)
        if self._losses[jobs[0]] < _MAX_LOSSES:
            return False
        for job in jobs:
            del self._losses[job]
        return True

    def take_all(self) -> list[Job]:
        """The jobs of all calls; none is left."""
        jobs = [job for call in self._calls for job in call.jobs]
        self._calls.clear()
        return jobs


@dataclass(frozen=True, eq=False)
class InFlightCall:
    """A call with passes and steps that the worker has, or has next.

    Attributes:
        sent_at: the event loop's time, in seconds.
        cost: of its passes, in tokens.
    """

    call: Call
    packed: Packed
    result: asyncio.Task[Trained]
    sent_at: float
    cost: int

    def drop(self) -> None:
        """Nobody waits for its result any more."""
        self.result.cancel()
        # Else asyncio would warn of an exception that nobody has retrieved.
        self.result.add_done_callback(lambda done: done.cancelled() or done.exception())


class CallTimes:
    """Estimates when a call will be done: seconds per token, an exponential mean over calls."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None
        self._free_at = 0.0  # when the last call ended

    def ended(self, in_flight: InFlightCall, now: float) -> None:
        """It has been computed; since it was sent, or since the call before it ended."""
        seconds_per_token = (now - max(in_flight.sent_at, self._free_at)) / max(1, in_flight.cost)
        self._free_at = now
        if self._seconds_per_token is not None:
            seconds_per_token = _WEIGHT * seconds_per_token + (1 - _WEIGHT) * self._seconds_per_token
        self._seconds_per_token = seconds_per_token

    def late_at(self, in_flight: InFlightCall) -> float | None:
        """When most of it will have been computed, in the event loop's time; None if nothing is known yet."""
        if self._seconds_per_token is None:
            return None
        begins = max(in_flight.sent_at, self._free_at)
        return begins + DISPATCH_AT * in_flight.cost * self._seconds_per_token
