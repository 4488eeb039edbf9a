"""Picks what runs next: ready jobs of many runs at once, fair between tenants, in order within a run."""

import asyncio
from collections import OrderedDict

from twinkle.protocol import messages as m
from twinkle.server.scheduling.company import Company
from twinkle.server.scheduling.fairness import DeficitRoundRobin
from twinkle.server.scheduling.jobs import Job, Tick
from twinkle.server.scheduling.run_queue import RunQueue


class Scheduler:
    """All runs' queues. Single-threaded: everything is called on one event loop.

    A run is ready while its queue has a head. Only ready runs and their tenants are ever looked at, so an idle run
    costs nothing.
    """

    def __init__(self, tick_tokens: int) -> None:
        """
        Args:
            tick_tokens: most tokens of training passes in one tick (a single larger job is taken alone).
        """
        self._tick_tokens = tick_tokens
        self._queues: dict[str, RunQueue] = {}
        self._ready: dict[str, OrderedDict[str, None]] = {}  # tenant -> its ready runs, next first
        self._turns = DeficitRoundRobin(quantum=max(1, tick_tokens // 8))
        self._work = asyncio.Event()
        self._arrived = asyncio.Event()  # set by every job that comes
        self._company = Company()
        self._patience_seconds = 0.0
        self._enough_tokens = 0
        self._ready_runs = 0
        self._queued_tokens = 0

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
        self._queued_tokens -= sum(job.tokens for job in drained)
        return drained

    def queue(self, run_id: str) -> RunQueue:
        return self._queues[run_id]

    def submit(self, job: Job) -> None:
        queue = self._queues[job.run_id]
        queue.offer(job)
        self._queued_tokens += job.tokens
        self._arrived.set()
        if queue.head() is not None:
            self._set_ready(job.run_id, job.tenant, ready=True)

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

    def _is_short_of_company(self) -> bool:
        return self._ready_runs < self._company.wanted and self._queued_tokens < self._enough_tokens

    def take_tick(self) -> Tick:
        """What is ready now, up to `tick_tokens`."""
        tick = self._take_ready()
        self._company.took_part(job.run_id for job in tick.passes)
        return tick

    def _take_ready(self) -> Tick:
        tick = Tick([], [], [])
        budget = self._tick_tokens
        closed: set[str] = set()  # runs that gave their barrier, or whose next job no longer fits
        while turn := self._open_turn(closed):
            tenant, runs = turn
            self._turns.grant(tenant)
            for run_id in runs:
                budget = self._take_from_run(run_id, tenant, tick, budget, closed)
                if budget <= 0:
                    return tick
        return tick

    def _open_turn(self, closed: set[str]) -> tuple[str, list[str]] | None:
        """The next tenant that still has a ready run outside of `closed`, and those runs."""
        for tenant in self._turns.in_turn():
            runs = [run_id for run_id in self._ready[tenant] if run_id not in closed]
            if runs:
                return tenant, runs
        return None

    def _take_from_run(self, run_id: str, tenant: str, tick: Tick, budget: int, closed: set[str]) -> int:
        """Move one run's ready jobs into the tick, as far as the tenant's deficit and the budget reach.

        Returns:
            The budget that is left.
        """
        queue = self._queues[run_id]
        while (job := queue.head()) is not None:
            if not self._turns.can_spend(tenant, job.tokens):
                return budget
            if job.tokens > budget and tick.passes:
                closed.add(run_id)
                return budget
            self._turns.spend(tenant, job.tokens)
            self._queued_tokens -= job.tokens
            self._place(queue.pop(), tick)
            budget -= job.tokens
            if not isinstance(job.request, m.ForwardBackwardRequest):
                closed.add(run_id)
                break
            if budget <= 0:
                break
        # Its other runs come first next time.
        self._ready[tenant].move_to_end(run_id)
        if queue.head() is None:
            self._set_ready(run_id, tenant, ready=False)
        return budget

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
                self._turns.deactivate(tenant)
        if self._ready:
            self._work.set()
        else:
            self._work.clear()
