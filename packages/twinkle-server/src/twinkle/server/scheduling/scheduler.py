"""Picks what runs next: ready jobs of many runs together, fair between tenants, in order within a run."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from statistics import median_low

from twinkle.protocol import messages as m
from twinkle.server.scheduling.batching_window import BatchingWindow
from twinkle.server.scheduling.runs import Job, Run
from twinkle.server.scheduling.turns import Turns

# Tenants that a tick looks at to find out what is usual, and in vain before it begins without more: so what picking a
# tick costs doesn't depend on how many others wait.
_LOOKED_AT = 64


@dataclass(frozen=True)
class Tick:
    """What runs together: first all passes, in shared micro-batches, then all optimizer steps, then the rest one by
    one. Each run brings any number of passes followed by at most one other job.
    """

    passes: tuple[Job, ...] = ()
    optim_steps: tuple[Job, ...] = ()
    others: tuple[Job, ...] = ()

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Tick:
        """A tick of these jobs, which are in order within each run."""
        kinds: dict[type, list[Job]] = {m.ForwardBackwardRequest: [], m.OptimStepRequest: []}
        others: list[Job] = []
        for job in jobs:
            kinds.get(type(job.request), others).append(job)
        passes, optim_steps = kinds.values()
        return cls(tuple(passes), tuple(optim_steps), tuple(others))

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.passes, *self.optim_steps, *self.others)

    def split_independent(self) -> list[Tick]:
        """The tick in at most two parts: runs without a pass in it, which need not wait for the passes, then the
        others.
        """
        with_passes = {job.run for job in self.passes}
        halves = [
            Tick.of(job for job in self.jobs if (job.run in with_passes) == is_slow)
            for is_slow in (False, True)
        ]
        return [half for half in halves if half.jobs]


class Scheduler:
    """The ready runs. Single-threaded: everything is called on one event loop.

    A run is ready while its queue has a head. Only ready runs and their tenants are ever looked at, so idle runs cost
    nothing.
    """

    def __init__(self, tick_tokens: int, overhead_tokens: int = 1) -> None:
        """
        Args:
            tick_tokens: most tokens of training passes in one tick (a single larger job is taken alone).
            overhead_tokens: a tick's fixed cost, in tokens.
        """
        self._tick_tokens = tick_tokens
        self._overhead_tokens = overhead_tokens
        self._ready: dict[str, OrderedDict[Run, Job]] = {}  # tenant -> heads of its ready runs, next first
        self._turns = Turns()
        self._large: list[str] = []  # tenants whose next job was too large for the last tick
        self._work = asyncio.Event()
        self._arrived = asyncio.Event()  # set when a job arrives
        self._window = BatchingWindow()
        self._ready_runs = 0
        self._queued: Counter[str] = Counter()  # tenant -> its queued tokens
        self._queued_tokens = 0  # of all tenants

    def set_batching_window(self, seconds: float, enough_tokens: int) -> None:
        """Let ticks wait for more runs from now on.

        Args:
            seconds: the longest wait; a tick's fixed cost, so that waiting in vain at most doubles it.
            enough_tokens: a tick begins at once if this many are queued: they cost far more than a tick of their own.
        """
        self._window.seconds, self._window.enough_tokens = seconds, enough_tokens

    @property
    def ready_tenants(self) -> AbstractSet[str]:
        """Tenants with a job that could be taken now."""
        return self._ready.keys()

    # ------------------------------------------------------------ runs and jobs

    def submit(self, job: Job) -> None:
        head = job.run.queue.offer(job)
        self._queued[job.run.tenant] += job.tokens
        self._queued_tokens += job.tokens
        self._arrived.set()
        self._set_head(job.run, head)

    def remove(self, run: Run) -> list[Job]:
        """Remove a run; returns what it had queued."""
        drained = run.queue.drain()
        self._update(run)
        self._leave(run.tenant, _tokens(drained))
        return drained

    def hold(self, job: Job) -> None:
        """A job that was taken can't be done yet: nothing of its run is taken until it is given back."""
        job.run.queue.hold(job)
        self._update(job.run)

    def give_back(self, job: Job) -> bool:
        """The job can be done now; returns False if its run has ended meanwhile."""
        if job.run.has_ended:
            return False
        job.run.queue.give_back(job)
        self._arrived.set()
        self._update(job.run)
        return True

    def reject(self, run: Run, seq_id: int) -> None:
        """Count a refused request's id as consumed."""
        run.queue.reject(seq_id)
        self._update(run)

    def close_gaps(self, run: Run) -> list[int]:
        """Count every missing id before the run's last one as consumed; returns them."""
        closed = run.queue.close_gaps()
        self._update(run)
        return closed

    # ------------------------------------------------------------ ticks

    async def next_tick(self) -> Tick:
        """The next tick, as soon as there is work, or within the batching window if more runs are expected."""
        await self._work.wait()
        try:
            async with asyncio.timeout(self._window.seconds):
                while self._is_worth_lingering():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
        return self.take_tick()

    async def until_complete(self, in_flight: AbstractSet[Run]) -> None:
        """Wait until the next tick can't grow while these runs' clients wait for results: it is full, or all other
        active runs are ready.
        """
        await self._work.wait()
        expected = self._window.num_active_beside(in_flight)  # ticks are taken by the one who waits here
        while self._ready_runs < expected and self._queued_tokens < self._tick_tokens:
            self._arrived.clear()
            await self._arrived.wait()

    def _is_worth_lingering(self) -> bool:
        return self._ready_runs < self._window.num_wanted and self._queued_tokens < self._window.enough_tokens

    def take_tick(self) -> Tick:
        """What is ready now, up to `tick_tokens`."""
        tick = Tick.of(self._take_ready())
        self._window.add_tick(job.run for job in tick.passes)
        return tick

    def _take_ready(self) -> list[Job]:
        """Take what tenants may bring whose jobs are no larger than a share, those first who have been given least. A
        tenant with a larger job goes next, in a tick of its own.

        So a tenant with little to do waits for the tick being computed, and then for one in which nobody brings much
        more than it does, however much they have queued. Where not all fit into a tick they take turns.
        """
        if not self._ready:
            return []
        if len(self._ready) == 1:
            return self._take_alone(next(iter(self._ready)))
        large, self._large = [tenant for tenant in self._large if self._may_bring(tenant)], []
        return self._take_large(large) if large else self._take_shares()

    def _take_alone(self, tenant: str) -> list[Job]:
        self._large = []
        jobs = self._take_from_tenant(tenant, max(self._tick_tokens, self._first_head(tenant).tokens))
        self._turns.settle(tenant)
        return jobs

    def _take_shares(self) -> list[Job]:
        looked_at = self._turns.take_first(_LOOKED_AT)
        share = self._fair_share(looked_at)
        self._turns.earn(share, least=looked_at[0])
        jobs, large = self._bring_shares(share, looked_at)
        self._turns.put_back(looked_at)
        if jobs:
            self._large = large
            return jobs
        # Even the smallest jobs exceed a share.
        sizes = {tenant: self._first_head(tenant).tokens for tenant in large}
        least = min(sizes.values())
        self._large = [tenant for tenant, size in sizes.items() if size > least]
        return self._take_large([tenant for tenant, size in sizes.items() if size == least])

    def _bring_shares(self, share: int, looked_at: list[str]) -> tuple[list[Job], list[str]]:
        """What each tenant may bring, and the tenants whose next job is larger than a share, in turn.

        Args:
            looked_at: who is first; those who are looked at beyond them are appended.
        """
        budget = max(self._tick_tokens, share)
        jobs: list[Job] = []
        large: list[str] = []
        number = in_vain = 0
        while in_vain < _LOOKED_AT:
            if number == len(looked_at) and budget > 0:
                looked_at += self._turns.take_first(1)
            if number == len(looked_at):
                break
            tenant, number = looked_at[number], number + 1
            balance = self._turns.balance(tenant)
            if balance <= 0:
                break  # and nobody who comes after it may bring more
            brought: list[Job] = []
            if self._first_head(tenant).tokens > share:
                large.append(tenant)
            elif budget > 0:
                brought = self._take_from_tenant(tenant, min(budget, balance))
                budget -= _tokens(brought)
                jobs += brought
            in_vain += not brought
        return jobs, large

    def _fair_share(self, first: Sequence[str]) -> int:
        """Tokens that each tenant may bring: the median of what tenants with passes have queued, of those who are first
        in turn. So tenants with similar work all fit into a tick, and one with much more brings no more than they do.

        Where they don't all fit, no more than an equal part of the tick; among more than two, whose parts may be small,
        the median of their next jobs, so that half of them can bring one. At least a tick's fixed cost, which at most
        doubles the tick.
        """
        with_passes = [tenant for tenant in first if self._queued[tenant]]
        if not with_passes:
            return self._overhead_tokens
        median = median_low(self._queued[tenant] for tenant in with_passes)
        part = self._tick_tokens // len(self._ready)
        if len(self._ready) > 2:
            part = max(part, median_low(self._first_head(tenant).tokens for tenant in with_passes))
        return max(self._overhead_tokens, min(median, part))

    def _take_large(self, tenants: list[str]) -> list[Job]:
        """The first of these tenants brings its next job, the others what is not larger."""
        share = self._first_head(tenants[0]).tokens
        budget = max(self._tick_tokens, share)
        jobs: list[Job] = []
        for tenant in tenants:
            brought = self._take_from_tenant(tenant, min(budget, share))
            budget -= _tokens(brought)
            jobs += brought
        self._turns.put_back(tenants)
        return jobs

    def _may_bring(self, tenant: str) -> bool:
        return tenant in self._ready and self._turns.balance(tenant) > 0

    def _first_head(self, tenant: str) -> Job:
        """The next job of the tenant's next run."""
        return next(iter(self._ready[tenant].values()))

    def _take_from_tenant(self, tenant: str, room: int) -> list[Job]:
        """Take ready jobs of a tenant's runs out of their queues, within `room` tokens."""
        left, taken = room, list[Job]()
        for run in list(self._ready[tenant]):
            jobs, head = run.queue.take(left)
            left -= _tokens(jobs)
            taken += jobs
            if jobs and head is not None:
                self._ready[tenant].move_to_end(run)  # the others go first next time
            self._set_head(run, head)
        if taken:
            self._leave(tenant, room - left)
            self._turns.charge(tenant, room - left)
        return taken

    def _leave(self, tenant: str, tokens: int) -> None:
        """Count these tokens as no longer queued."""
        self._queued_tokens -= tokens
        self._queued[tenant] -= tokens
        if not self._queued[tenant]:
            del self._queued[tenant]

    def _update(self, run: Run) -> None:
        """The run's queue has changed: it may have become ready, or no longer be."""
        self._set_head(run, run.queue.head)

    def _set_head(self, run: Run, head: Job | None) -> None:
        was_ready = run in self._ready.get(run.tenant, ())
        if head is not None:
            self._ready.setdefault(run.tenant, OrderedDict())[run] = head
            if not was_ready:
                self._ready_runs += 1
                self._turns.activate(run.tenant)
        elif was_ready:
            self._ready_runs -= 1
            del self._ready[run.tenant][run]
            if not self._ready[run.tenant]:
                del self._ready[run.tenant]
                self._turns.deactivate(run.tenant)
        if self._ready:
            self._work.set()
        else:
            self._work.clear()


def _tokens(jobs: Iterable[Job]) -> int:
    return sum(job.tokens for job in jobs)
