"""Which runs' adapters are on the worker: those in use, and as many others as fit a budget.

Beyond the budget the least recently used are evicted, from the tenant with the most bytes: a run's whole state,
accumulated gradient included, goes to disk, and is restored as it was before the run's next job. An evicted run costs
the worker nothing and has nothing to lose when the worker is lost. A loss evicts all runs, which are then restored from
their snapshots.

Moves runs between `RESIDENT` and `EVICTED` and keeps their order of use; `snapshots` takes the snapshots.
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

# Which layers an adapter acts on: attention, feed-forward, output head. With the rank this determines its size.
_Layers: TypeAlias = tuple[bool, bool, bool]

# Arrays of the weights' size: weights and two moments; a gradient adds one.
_COPIES = 3
# After a failed write the disk is left alone for this long: full or gone, it is so for the next run too.
_PAUSE_SECONDS = 10.0


class Residency:
    """Single-threaded: called on one event loop, `bring_in` between two calls to the worker.

    Adapters in use are never evicted, so a single call may exceed the budget.
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
            budget: most bytes of all resident adapters together, counting whole adapters however many ranks hold a part
                of them. None: nothing is evicted.
        """
        self._worker = worker
        self._snapshots = snapshots
        self._budget: float = math.inf if snapshots.files is None or budget is None else budget
        self._clock = clock
        self._resident: OrderedDict[Run, None] = OrderedDict()  # least recently used first
        self._in_use: dict[Run, None] = {}  # an ordered set
        self._bytes_of_rank_1: dict[_Layers, int] = {}
        self._paused_until = -math.inf
        self.total_bytes = 0
        """Total of all resident adapters."""

    @property
    def count(self) -> int:
        """How many adapters are resident."""
        return len(self._resident)

    # ------------------------------------------------------------ what happened to a run

    def added(self, run: Run) -> None:
        """The run's adapter was made."""
        run.state = RunState.RESIDENT
        self._resident[run] = None
        self._recount(run)

    def drop(self, run: Run, state: RunState) -> bool:
        """The run is off the worker, or is to leave it; returns whether it was resident."""
        was_resident = run in self._resident
        if was_resident:
            del self._resident[run]
            self.total_bytes -= run.bytes
            run.bytes = 0
        run.state = state
        return was_resident

    def worker_lost(self) -> None:
        """The worker was restarted without adapters: all runs are evicted."""
        for run in list(self._resident):
            self.drop(run, RunState.EVICTED)
            self._snapshots.worker_lost(run)
        self._in_use = {}

    def _recount(self, run: Run) -> None:
        """Count a resident run's bytes again: it may have gained or lost a gradient."""
        if run in self._resident:
            self._set_bytes(run, self._bytes(run, run.has_gradient))

    # ------------------------------------------------------------ what a tick needs

    def split(self, tick: Tick) -> list[Tick]:
        """Split the tick into parts (at least one) whose adapters fit the budget together, or that have only one run.

        All jobs of a run are in one part. Resident runs come first, so that they aren't evicted in between.
        """
        if self._budget == math.inf:
            return [tick]
        part_of = self._fit(tick)
        num_parts = max(part_of.values(), default=0) + 1
        return [Tick.of(job for job in tick.jobs if part_of[job.run] == part) for part in range(num_parts)]

    def _fit(self, tick: Tick) -> dict[Run, int]:
        """The number of the part (0, 1, 2, ...) of each of the tick's runs."""
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
        """The tick is about to run, call by call: what its later calls need is evicted last."""
        for job in tick.jobs:
            if job.run in self._resident:
                self._resident.move_to_end(job.run)

    def claim(self, runs: Iterable[Run]) -> bool:
        """Add these runs to those in use, if all are resident with room for a gradient each; returns False if that
        would take a call to the worker.
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
        """Have these runs' adapters on the worker, or room for those about to be made; others may be evicted.

        Args:
            adding_gradients: the call leaves each of them with a gradient.

        Raises:
            WorkerLost: as the worker; each run is still resident or evicted.
            Exception: if one can't be restored; it stays evicted.
        """
        for run in self._in_use:  # only these have been worked on since
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
        """Evict what is not in use until `needed` bytes fit, as far as possible."""
        while self.total_bytes + needed > self._budget and self._clock() >= self._paused_until:
            leaving = self._next_to_leave()
            if leaving is None:
                return
            await self._evict(leaving)

    def _next_to_leave(self) -> Run | None:
        """The least recently used run of the tenant whose adapters take most, counting those about to be added, so that
        a tenant with many evicts its own. None if all that are left are in use.
        """
        taken: Counter[str] = Counter()
        for run in self._in_use:
            if run not in self._resident:
                taken[run.tenant] += self._bytes(run, run.has_gradient)
        oldest: dict[str, Run] = {}  # tenant -> its least recently used run
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
        # From here on its snapshot counts, even if the worker is lost: that takes its adapters with it anyway.
        freed = run.bytes
        self.drop(run, RunState.EVICTED)
        log.info("run %s went to disk, %d bytes; %d runs stay", run.run_id, freed, len(self._resident))
        await self._worker.remove_adapter(run.run_id)

    async def _bring_back(self, run: Run) -> None:
        """Restore an evicted run on the worker."""
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
        """Find out the size of an adapter on these layers, by making one and removing it.

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
        """The size of a run's adapter: proportional to the rank; 0 until one on the same layers was measured."""
        return self._bytes_of_rank_1.get(_layers(run.spec), 0) * run.spec.rank * (_COPIES + has_gradient)

    def _set_bytes(self, run: Run, size: int) -> None:
        self.total_bytes += size - run.bytes
        run.bytes = size


def _layers(spec: AdapterSpec) -> _Layers:
    return spec.train_attn, spec.train_mlp, spec.train_unembed
