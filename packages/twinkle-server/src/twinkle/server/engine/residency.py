"""Which runs' adapters are on the worker: those that are being worked on, and of the others what a budget has room for.

Beyond the budget the least recently used leave, of the tenant who has most there: a run's whole state, with the
gradient that it has accumulated, goes to disk, and comes back as it was before the run's next job. Between these a run
is evicted: it costs the worker nothing, and has nothing to lose when the worker is lost. When that happens all runs are
evicted, and come back as their snapshots are.

Moves runs between `RESIDENT` and `EVICTED` and keeps their order of use; taking snapshots is `snapshots`' business.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.runs import Run, RunState
from twinkle.server.scheduling.scheduler import Tick

log = logging.getLogger("twinkle.engine")

# Which layers an adapter acts on: attention, feed-forward, output head. With the rank it gives the size.
_Layers: TypeAlias = tuple[bool, bool, bool]

# Matrices of the weights' size: weights and two moments; a gradient is one more.
_COPIES = 3
# After a write has failed the disk is left alone for so long: it is full, or not there, for the next run too.
_PAUSE_SECONDS = 10.0


class Residency:
    """Single-threaded: called on one event loop, `bring_in` between two calls to the worker.

    What is in use is never evicted, so what a single call needs may exceed the budget.
    """

    def __init__(
        self,
        worker: WorkerPort,
        snapshots: Snapshots,
        budget: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            snapshots: without files, nothing is evicted.
            budget: bytes that all resident adapters together may take, whole adapters that is, however many ranks
                hold a part of them. None evicts nothing.
        """
        self._worker = worker
        self._snapshots = snapshots
        self._budget: float = math.inf if snapshots.files is None or budget is None else budget
        self._clock = clock
        self._resident: OrderedDict[Run, None] = OrderedDict()  # least recently used first
        self._in_use: dict[Run, None] = {}  # a set that keeps its order
        self._bytes_of_rank_1: dict[_Layers, int] = {}
        self._paused_until = -math.inf
        self.total_bytes = 0
        """Of all resident adapters."""

    # ------------------------------------------------------------ what happened to a run

    def added(self, run: Run) -> None:
        """Its adapter was made."""
        run.state = RunState.RESIDENT
        self._resident[run] = None
        self._recount(run)

    def drop(self, run: Run, state: RunState) -> bool:
        """The run is off the worker, or is not to be there any more; returns whether it was."""
        was_resident = run in self._resident
        if was_resident:
            del self._resident[run]
            self.total_bytes -= run.bytes
            run.bytes = 0
        run.state = state
        return was_resident

    def worker_lost(self) -> None:
        """The worker was started again, without adapters: each run is its snapshot, until it is asked for."""
        for run in list(self._resident):
            self.drop(run, RunState.EVICTED)
            self._snapshots.worker_lost(run)
        self._in_use = {}

    def _recount(self, run: Run) -> None:
        """A resident run may have come to a gradient, or lost it."""
        if run in self._resident:
            self._set_bytes(run, self._bytes(run, run.has_gradient))

    # ------------------------------------------------------------ what a tick needs

    def split(self, tick: Tick) -> list[Tick]:
        """The tick in parts, one at least, so that the adapters of each fit the budget together (or it has but one).

        All jobs of a run are in one part. What is resident comes first, so that it doesn't leave and come back.
        """
        if self._budget == math.inf:
            return [tick]
        part_of = self._fit(tick)
        num_parts = max(part_of.values(), default=0) + 1
        return [Tick.of(job for job in tick.jobs if part_of[job.run] == part) for part in range(num_parts)]

    def _fit(self, tick: Tick) -> dict[Run, int]:
        """For each run of the tick, the number of its part: 0, 1, 2, ..."""
        training = {job.run for job in tick.passes}
        runs = dict.fromkeys(job.run for job in tick.jobs)
        part_of: dict[Run, int] = {}
        part, room = 0, self._budget
        for run in sorted(runs, key=lambda run: run not in self._resident):
            needed = self._bytes(run, run in training or run.has_gradient)
            if needed > room and room < self._budget:  # it isn't alone
                part, room = part + 1, self._budget
            part_of[run] = part
            room -= needed
        return part_of

    def expect(self, tick: Tick) -> None:
        """The tick is about to be run, call by call: what a later one needs is the last to leave."""
        for job in tick.jobs:
            if job.run in self._resident:
                self._resident.move_to_end(job.run)

    def claim(self, runs: Iterable[Run]) -> bool:
        """Have these runs in use beside those that are already, if they are resident and have room for a gradient
        each; False if that would take a call to the worker.
        """
        claimed = dict.fromkeys(runs)
        if any(run not in self._resident for run in claimed):
            return False
        more = sum(self._bytes(run, has_gradient=True) - run.bytes for run in claimed)
        if self.total_bytes + more > self._budget:
            return False
        self._in_use |= claimed
        for run in claimed:
            self._resident.move_to_end(run)
            self._set_bytes(run, self._bytes(run, has_gradient=True))
        return True

    async def bring_in(self, runs: Iterable[Run], adding_gradients: bool = False) -> None:
        """Have these runs' adapters on the worker, or room for those that are about to be made; others may leave.

        Args:
            adding_gradients: what is to be done leaves each of them with a gradient.

        Raises:
            WorkerLost: as the worker; each run is still resident or evicted.
            Exception: if one can't be brought back; it stays evicted.
        """
        for run in self._in_use:  # the only ones that have been worked on since
            self._recount(run)
        self._in_use = dict.fromkeys(runs)
        for run in self._in_use:
            if run in self._resident:
                self._resident.move_to_end(run)
                self._set_bytes(run, self._bytes(run, adding_gradients or run.has_gradient))
            else:
                await self._measure(run.spec)
        await self._make_room(0)
        for run in self._in_use:
            if run not in self._resident:
                needed = self._bytes(run, adding_gradients or run.has_gradient)
                await self._make_room(needed)
                if run.state is not RunState.CREATED:
                    await self._bring_back(run)
                    self._set_bytes(run, needed)

    # ------------------------------------------------------------ out and in

    async def _make_room(self, needed: int) -> None:
        """Evict what is not in use until `needed` bytes fit, as far as that goes."""
        while self.total_bytes + needed > self._budget and self._clock() >= self._paused_until:
            leaving = self._next_to_leave()
            if leaving is None:
                return
            await self._evict(leaving)

    def _next_to_leave(self) -> Run | None:
        """The run that was least recently used of the tenant whose adapters take most, with those that are about to
        come, so that one with many pushes out its own. None if all that are left are in use.
        """
        taken: Counter[str] = Counter()
        for run in self._in_use:
            if run not in self._resident:
                taken[run.tenant] += self._bytes(run, run.has_gradient)
        oldest: dict[str, Run] = {}  # tenant -> its run that was least recently used
        for run in self._resident:
            taken[run.tenant] += run.bytes
            if run not in self._in_use:
                oldest.setdefault(run.tenant, run)
        return oldest[max(oldest, key=lambda tenant: taken[tenant])] if oldest else None

    async def _evict(self, run: Run) -> None:
        """Take a resident run off the worker, once it is on disk. If it can't be written it stays."""
        try:
            await self._snapshots.take(run)
            is_written = await self._snapshots.written(run)
        except WorkerLost:
            raise
        except Exception:
            log.exception("no snapshot of run %s could be taken", run.run_id)
            is_written = False
        if not is_written:
            self._paused_until = self._clock() + _PAUSE_SECONDS
            log.warning(
                "run %s could not be written to disk: adapters take more memory than they should", run.run_id
            )
            return
        # From here on its snapshot counts, also if the worker is lost: adapters that were on it are gone anyway.
        freed = run.bytes
        self.drop(run, RunState.EVICTED)
        log.info("run %s went to disk, %d bytes; %d runs stay", run.run_id, freed, len(self._resident))
        await self._worker.remove_adapter(run.run_id)

    async def _bring_back(self, run: Run) -> None:
        """Put an evicted run onto the worker, as it was."""
        state = await self._snapshots.read(run)
        await self._worker.add_adapter(run.run_id, run.spec)
        if state is not None:
            try:
                await self._worker.import_adapter(run.run_id, state)
            except WorkerLost:
                raise
            except BaseException:
                await self._worker.remove_adapter(run.run_id)
                raise
        run.has_gradient = state is not None and state.gradients is not None
        self.added(run)
        log.info("run %s came back", run.run_id)

    # ------------------------------------------------------------ bytes

    async def _measure(self, spec: AdapterSpec) -> None:
        """Find out what an adapter on these layers takes, by making one that is then gone.

        Raises:
            Exception: what the worker raises, as it would for the run itself.
        """
        layers = _layers(spec)
        if self._budget == math.inf or layers in self._bytes_of_rank_1:
            return
        await self._worker.add_adapter("measured", replace(spec, rank=1))
        try:
            state = await self._worker.export_adapter("measured", with_optimizer=False)
        finally:
            await self._worker.remove_adapter("measured")
        self._bytes_of_rank_1[layers] = sum(matrix.nbytes for matrix in state.weights.values())

    def _bytes(self, run: Run, has_gradient: bool) -> int:
        """What a run's adapter takes: its matrices grow with the rank. 0 while none on the same layers was measured."""
        return self._bytes_of_rank_1.get(_layers(run.spec), 0) * run.spec.rank * (_COPIES + has_gradient)

    def _set_bytes(self, run: Run, size: int) -> None:
        self.total_bytes += size - run.bytes
        run.bytes = size


def _layers(spec: AdapterSpec) -> _Layers:
    return spec.train_attn, spec.train_mlp, spec.train_unembed
