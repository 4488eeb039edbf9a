"""Picks what runs next: ready jobs of many runs at once, fair between tenants, in order within a run."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Set as AbstractSet

from twinkle.protocol import messages as m
from twinkle.server.scheduling.company import Company
from twinkle.server.scheduling.fair_queue import FairQueue
from twinkle.server.scheduling.jobs import Job, Tick
from twinkle.server.scheduling.runs import RunQueue


class Scheduler:
    """All runs' queues. Single-threaded: everything is called on one event loop.

    A run is ready while its queue has a head. Only ready runs and their tenants are ever looked at, so an idle run
    costs nothing.
    """

    def __init__(self, tick_tokens: int, overhead_tokens: int = 1) -> None:
        """
        Args:
            tick_tokens: most tokens of training passes in one tick (a single larger job is taken alone).
            overhead_tokens: what a tick costs beside its tokens, in tokens.
        """
        self._tick_tokens = tick_tokens
        self._overhead_tokens = overhead_tokens
        self._queues: dict[str, RunQueue] = {}
        self._ready: dict[str, OrderedDict[str, None]] = {}  # tenant -> its ready runs, next first
        self._turns = FairQueue()
        self._large: list[str] = []  # tenants whose next job was too large for the last tick
        self._work = asyncio.Event()
        self._arrived = asyncio.Event()  # set by every job that comes
        self._company = Company()
        self._patience_seconds = 0.0
        self._enough_tokens = 0
        self._ready_runs = 0
        self._queued: Counter[str] = Counter()  # tenant -> tokens of what it has queued
        self._queued_tokens = 0  # of all of them

    def wait_for_company(self, seconds: float, enough_tokens: int) -> None:
        """From now on a tick may wait for more runs.

        Args:
            seconds: at most so long; what a tick costs at least, so that waiting in vain at most doubles it.
            enough_tokens: with so many tokens a tick begins at once: they cost far more than a tick of their own.
        """
        self._patience_seconds = seconds
        self._enough_tokens = enough_tokens

    # ------------------------------------------------------------ runs and jobs

    def add_run(self, run_id: str, first_seq_id: int = 0) -> RunQueue:
        """A queue for a new run; its first job is its creation, `seq_id` 0."""
        self._queues[run_id] = RunQueue(first_seq_id)
        return self._queues[run_id]

    def remove_run(self, run_id: str, tenant: str) -> list[Job]:
        """Forget a run; what it had queued is returned."""
        queue = self._queues.pop(run_id, None)
        self._set_ready(run_id, tenant, ready=False)
        drained = queue.drain() if queue else []
        for job in drained:
            self._leaves(job)
        return drained

    def has_run(self, run_id: str) -> bool:
        return run_id in self._queues

    def queue(self, run_id: str) -> RunQueue:
        return self._queues[run_id]

    def submit(self, job: Job) -> None:
        queue = self._queues[job.run_id]
        queue.offer(job)
        self._queued[job.tenant] += job.tokens
        self._queued_tokens += job.tokens
        self._arrived.set()
        if queue.head() is not None:
            self._set_ready(job.run_id, job.tenant, ready=True)

    def hold(self, job: Job) -> None:
        """A job that was taken can't be done yet: nothing of its run is taken before it is given back."""
        self._queues[job.run_id].hold(job)
        self._set_ready(job.run_id, job.tenant, ready=False)

    def give_back(self, job: Job) -> bool:
        """It can be done now; False if its run has ended meanwhile."""
        queue = self._queues.get(job.run_id)
        if queue is None:
            return False
        queue.give_back(job)
        self._arrived.set()
        self._set_ready(job.run_id, job.tenant, ready=True)
        return True

    def reject(self, run_id: str, tenant: str, seq_id: int) -> None:
        """Count a refused request's id as consumed."""
        queue = self._queues[run_id]
        queue.reject(seq_id)
        if queue.head() is not None:
            self._set_ready(run_id, tenant, ready=True)

    def why_waiting(self, run_id: str, request_id: str) -> str | None:
        """Why a request has no result yet, in words; None if its run is gone."""
        queue = self._queues.get(run_id)
        if queue is None:
            return None
        return f"{queue.why_waiting(request_id)}; {len(self._ready)} tenants have requests ready"

    # ------------------------------------------------------------ ticks

    async def next_tick(self) -> Tick:
        """The next tick: as soon as there is anything to do, or a moment later, if more runs are about to come."""
        await self._work.wait()
        try:
            async with asyncio.timeout(self._patience_seconds):
                while self._is_short_of_company():
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass
        return self.take_tick()

    async def complete_beside(self, under_way: AbstractSet[str]) -> None:
        """Returns when the next tick will not grow while these runs' clients wait for results: it is full, or all other
        runs that have been coming are there.
        """
        await self._work.wait()
        while self._ready_runs < self._company.beside(under_way) and self._queued_tokens < self._tick_tokens:
            self._arrived.clear()
            await self._arrived.wait()

    def _is_short_of_company(self) -> bool:
        return self._ready_runs < self._company.wanted and self._queued_tokens < self._enough_tokens

    def take_tick(self) -> Tick:
        """What is ready now, up to `tick_tokens`."""
        tick = self._take_ready()
        self._company.took_part(job.run_id for job in tick.passes)
        return tick

    def _take_ready(self) -> Tick:
        """What all who are ready may bring, as far as their jobs are no larger than the share of each. Who has a larger
        one comes next, in a tick of its own.

        So a tenant with little to do waits for the end of the tick that is being computed, and then for one in which
        nobody brings much more than it does, however much they have.
        """
        tick = Tick([], [], [])
        if len(self._ready) == 1:
            self._take_alone(next(iter(self._ready)), tick)
        elif self._ready:
            large, self._large = [tenant for tenant in self._large if self._may_bring(tenant)], []
            if large:
                self._take_large(large, tick)
            else:
                self._take_shares(tick)
        return tick

    def _take_alone(self, tenant: str, tick: Tick) -> None:
        self._take_from_tenant(tenant, tick, max(self._tick_tokens, self._first_head(tenant).tokens))
        self._turns.settle(tenant)
        self._large = []

    def _take_shares(self, tick: Tick) -> None:
        share = self._fair_share()
        while not tick.jobs:
            self._turns.earn(share)
            self._large = self._bring_shares(tick, share)
            if self._large and not tick.jobs:  # the smallest of them are the small ones then
                sizes = {tenant: self._first_head(tenant).tokens for tenant in self._large}
                least = min(sizes.values())
                self._take_large([tenant for tenant, size in sizes.items() if size == least], tick)
                self._large = [tenant for tenant, size in sizes.items() if size > least]

    def _bring_shares(self, tick: Tick, share: int) -> list[str]:
        """Each tenant brings what it may; returns those whose next job is larger than a share, in turn."""
        budget = self._tick_tokens
        large: list[str] = []
        no_room: list[str] = []
        for tenant in self._turns.in_turn():
            if budget <= 0:
                break
            if not self._may_bring(tenant):
                continue
            head, balance = self._first_head(tenant).tokens, self._turns.balance(tenant)
            if head > share:
                large.append(tenant)
            elif budget < head <= balance:
                no_room.append(tenant)
            else:
                budget -= self._take_from_tenant(tenant, tick, min(budget, balance))
        self._turns.put_first(no_room)
        return large

    def _fair_share(self) -> int:
        """Tokens that each tenant may bring: what the median of those has queued who have anything to compute, so that
        tenants with like work are all in a tick, and one with much more brings no more than they do. At least what a
        tick costs anyway, so that it at most takes twice as long.
        """
        queued = sorted(self._queued[tenant] for tenant in self._ready if self._queued[tenant])
        if not queued:
            return self._overhead_tokens
        median = queued[(len(queued) - 1) // 2]
        return max(self._overhead_tokens, min(median, self._tick_tokens // len(queued)))

    def _take_large(self, tenants: list[str], tick: Tick) -> None:
        """The first of these brings its next job, and the others what is not larger."""
        share = self._first_head(tenants[0]).tokens
        budget = max(self._tick_tokens, share)
        for tenant in tenants:
            budget -= self._take_from_tenant(tenant, tick, min(budget, share))

    def _may_bring(self, tenant: str) -> bool:
        return tenant in self._ready and self._turns.balance(tenant) > 0

    def _first_head(self, tenant: str) -> Job:
        """The next job of the run whose turn it is among the tenant's."""
        head = self._queues[next(iter(self._ready[tenant]))].head()
        assert head is not None, "a run is ready while it has a head"
        return head

    def _take_from_tenant(self, tenant: str, tick: Tick, room: int) -> int:
        """Move ready jobs of a tenant's runs into the tick, as far as there is room for them; returns their tokens."""
        left, before = room, len(tick.jobs)
        for run_id in list(self._ready[tenant]):
            queue = self._queues[run_id]
            is_open, had = True, len(tick.jobs)
            while is_open and (job := queue.head()) is not None and job.tokens <= left:
                left -= job.tokens
                self._leaves(job)
                self._place(queue.pop(), tick)
                is_open = isinstance(job.request, m.ForwardBackwardRequest)
            if queue.head() is None:
                self._set_ready(run_id, tenant, ready=False)
            elif len(tick.jobs) > had:
                self._ready[tenant].move_to_end(run_id)  # the others come first next time
        if len(tick.jobs) > before:
            self._turns.charge(tenant, room - left)
        return room - left

    def _leaves(self, job: Job) -> None:
        self._queued_tokens -= job.tokens
        self._queued[job.tenant] -= job.tokens
        if not self._queued[job.tenant]:
            del self._queued[job.tenant]

    @staticmethod
    def _place(job: Job, tick: Tick) -> None:
        match job.request:
            case m.ForwardBackwardRequest():
                tick.passes.append(job)
            case m.OptimStepRequest():
                tick.optim_steps.append(job)
            case _:
                tick.others.append(job)

    def _set_ready(self, run_id: str, tenant: str, *, ready: bool) -> None:
        runs = self._ready.setdefault(tenant, OrderedDict())
        self._ready_runs += int(ready) - int(run_id in runs)
        if ready:
            runs[run_id] = None
            self._turns.activate(tenant)
        else:
            runs.pop(run_id, None)
            if not runs:
                del self._ready[tenant]
                # What its last pass cost beyond its share is forgiven: a client that waits for each result before it
                # sends more takes at most twice as long as alone, however large its batches.
                self._turns.settle(tenant)
                self._turns.deactivate(tenant)
        if self._ready:
            self._work.set()
        else:
            self._work.clear()
