"""Which runs' adapters are on the worker: those that are being worked on, and of the others what a budget has room for.

Beyond the budget the least recently used leave, of the tenant who has most there: a run's whole state, with the
gradient that it has accumulated, goes to disk, and comes back as it was before the run's next job. Between these a run
is evicted: it costs the worker nothing, and has nothing to lose when the worker is lost. When that happens all runs are
evicted, and come back as their copies are.

Owns who is where and what each takes; the copies are `snapshots`' business.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.jobs import Tick

log = logging.getLogger("twinkle.engine")

# Which layers an adapter acts on: attention, feed-forward, output head. With the rank it gives the size.
_Layers: TypeAlias = tuple[bool, bool, bool]

# Weights and two moments; a gradient comes on top.
_COPIES = 3
# After a write has failed the disk is left alone for so long: it is full, or not there, for the next run too.
_PAUSE_SECONDS = 10.0


class Residency:
    """Single-threaded: called on one event loop, `bring_in` between two calls to the worker.

    A run is resident, evicted, or about to be made. What is in use is never evicted, so what a single call needs may
    exceed the budget.
    """

    def __init__(
        self,
        runs: Mapping[str, LiveRun],
        worker: WorkerPort,
        snapshots: Snapshots,
        budget: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            runs: the live runs.
            snapshots: without files, nothing is evicted.
            budget: bytes that all resident adapters together may take, whole adapters that is, however many ranks
                hold a part of them. None evicts nothing.
        """
        self._runs = runs
        self._worker = worker
        self._snapshots = snapshots
        self._budget: float = math.inf if snapshots.files is None or budget is None else budget
        self._clock = clock
        self._resident: OrderedDict[str, int] = OrderedDict()  # run -> its bytes, least recently used first
        self._total = 0  # bytes of all of them
        self._evicted: set[str] = set()
        self._in_use: dict[str, None] = {}  # a set that keeps its order
        self._bytes_of_rank_1: dict[_Layers, int] = {}
        self._paused_until = -math.inf

    # ------------------------------------------------------------ what happened to a run

    def is_evicted(self, run_id: str) -> bool:
        return run_id in self._evicted

    def added(self, run_id: str) -> None:
        """Its adapter was made."""
        self._resident[run_id] = 0
        self.recount(run_id)

    def begin_evicted(self, run_id: str) -> None:
        """It is not on the worker, and can be brought in."""
        self._evicted.add(run_id)

    def recount(self, run_id: str) -> None:
        """A resident run may have come to a gradient, or lost it."""
        if run_id in self._resident:
            self._set_bytes(run_id, self._bytes(run_id, self._snapshots.has_gradient(run_id)))

    def worker_lost(self) -> None:
        """The worker begins anew, without adapters: each run is its copy, until it is asked for."""
        for run_id in list(self._resident):
            self._set_evicted(run_id)
            self._snapshots.worker_lost(run_id)
        self._in_use = {}

    async def give_up(self, run_id: str) -> None:
        """The run's state is lost: it is not to be on the worker."""
        if run_id in self._resident:
            self._set_evicted(run_id)
            self._in_use.pop(run_id, None)
            await self._worker.remove_adapter(run_id)

    def forget(self, run_id: str) -> None:
        """The run has ended."""
        self._total -= self._resident.pop(run_id, 0)
        self._evicted.discard(run_id)

    # ------------------------------------------------------------ what a tick needs

    def split(self, tick: Tick) -> list[Tick]:
        """The tick in parts, one at least, so that the adapters of each fit the budget together (or it has but one).

        All jobs of a run are in one part. What is resident comes first, lest it leave and come back.
        """
        if self._budget == math.inf:
            return [tick]
        part_of = self._fit(tick)
        parts = [Tick([], [], []) for _ in range(max(part_of.values(), default=0) + 1)]
        for job in tick.passes:
            parts[part_of[job.run_id]].passes.append(job)
        for job in tick.optim_steps:
            parts[part_of[job.run_id]].optim_steps.append(job)
        for job in tick.others:
            parts[part_of[job.run_id]].others.append(job)
        return parts

    def _fit(self, tick: Tick) -> dict[str, int]:
        """For each run of the tick, the number of its part: 0, 1, 2, ..."""
        training = {job.run_id for job in tick.passes}
        run_ids = dict.fromkeys(job.run_id for job in tick.jobs)
        part_of: dict[str, int] = {}
        part, room = 0, self._budget
        for run_id in sorted(run_ids, key=lambda run_id: run_id not in self._resident):
            needed = self._bytes(run_id, run_id in training or self._snapshots.has_gradient(run_id))
            if needed > room and room < self._budget:  # it isn't alone
                part, room = part + 1, self._budget
            part_of[run_id] = part
            room -= needed
        return part_of

    def expect(self, tick: Tick) -> None:
        """The tick is about to be run, step by step: what a later one needs is the last to leave."""
        for job in tick.jobs:
            if job.run_id in self._resident:
                self._resident.move_to_end(job.run_id)

    def has(self, run_ids: Iterable[str]) -> bool:
        """Whether these runs are on the worker, with room for a gradient each: `bring_in` calls nobody then."""
        room = self._budget - self._total
        for run_id in run_ids:
            if run_id not in self._resident:
                return False
            room -= self._bytes(run_id, has_gradient=True) - self._resident[run_id]
        return room >= 0

    async def bring_in(self, run_ids: Iterable[str], adding_gradients: bool = False) -> None:
        """Have these runs' adapters on the worker, or room for those that are about to be made; others may leave.

        Args:
            adding_gradients: what is to be done leaves each of them with a gradient.

        Raises:
            WorkerLost: as the worker; each run is still resident or evicted.
            Exception: if one can't be brought back; it stays evicted.
        """
        for run_id in self._in_use:  # the only ones that have been worked on since
            self.recount(run_id)
        self._in_use = dict.fromkeys(run_ids)
        for run_id in self._in_use:
            if run_id in self._resident:
                self._resident.move_to_end(run_id)
                self._set_bytes(
                    run_id, self._bytes(run_id, adding_gradients or self._snapshots.has_gradient(run_id))
                )
            else:
                await self._measure(self._runs[run_id].spec)
        await self._make_room(0)
        for run_id in self._in_use:
            if run_id not in self._resident:
                needed = self._bytes(run_id, adding_gradients or self._snapshots.has_gradient(run_id))
                await self._make_room(needed)
                if run_id in self._evicted:
                    await self._bring_back(run_id)
                    self._set_bytes(run_id, needed)

    # ------------------------------------------------------------ out and in

    async def _make_room(self, needed: int) -> None:
        """Evict what is not in use until `needed` bytes fit, as far as that goes."""
        while self._total + needed > self._budget and self._clock() >= self._paused_until:
            leaving = self._next_to_leave()
            if leaving is None:
                return
            await self._evict(leaving)

    def _next_to_leave(self) -> str | None:
        """The run that was least recently used of the tenant whose adapters take most, with those that are about to
        come, so that one with many pushes out its own. None if all that are left are in use.
        """
        taken: Counter[str] = Counter()
        for run_id in self._in_use:
            if run_id not in self._resident:
                taken[self._runs[run_id].tenant] += self._bytes(run_id, self._snapshots.has_gradient(run_id))
        oldest: dict[str, str] = {}  # tenant -> its run that was least recently used
        for run_id, size in self._resident.items():
            tenant = self._runs[run_id].tenant
            taken[tenant] += size
            if run_id not in self._in_use:
                oldest.setdefault(tenant, run_id)
        return oldest[max(oldest, key=lambda tenant: taken[tenant])] if oldest else None

    async def _evict(self, run_id: str) -> None:
        """Take a resident run off the worker, once it is on disk. If it can't be written it stays."""
        try:
            await self._snapshots.take(run_id)
            is_written = await self._snapshots.written(run_id)
        except WorkerLost:
            raise
        except Exception:
            log.exception("no copy of run %s could be taken", run_id)
            is_written = False
        if not is_written:
            self._paused_until = self._clock() + _PAUSE_SECONDS
            log.warning(
                "run %s could not be written to disk: adapters take more memory than they should", run_id
            )
            return
        # From here on its copy counts, also if the worker is lost: adapters that were on it are gone anyway.
        freed = self._set_evicted(run_id)
        log.info("run %s went to disk, %d bytes; %d runs stay", run_id, freed, len(self._resident))
        await self._worker.remove_adapter(run_id)

    def _set_evicted(self, run_id: str) -> int:
        """Returns the bytes that it took."""
        freed = self._resident.pop(run_id)
        self._total -= freed
        self._evicted.add(run_id)
        return freed

    async def _bring_back(self, run_id: str) -> None:
        """Put an evicted run onto the worker, as it was."""
        state = await self._snapshots.read(run_id)
        await self._worker.add_adapter(run_id, self._runs[run_id].spec)
        if state is not None:
            try:
                await self._worker.import_adapter(run_id, state)
            except WorkerLost:
                raise
            except BaseException:
                await self._worker.remove_adapter(run_id)
                raise
        self._evicted.discard(run_id)
        self._snapshots.brought_back(run_id, state)
        self.added(run_id)
        log.info("run %s came back", run_id)

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

    def _bytes(self, run_id: str, has_gradient: bool) -> int:
        """What a run's adapter takes: its matrices grow with the rank. 0 while none on the same layers was measured."""
        spec = self._runs[run_id].spec
        return self._bytes_of_rank_1.get(_layers(spec), 0) * spec.rank * (_COPIES + has_gradient)

    def _set_bytes(self, run_id: str, size: int) -> None:
        self._total += size - self._resident[run_id]
        self._resident[run_id] = size


def _layers(spec: AdapterSpec) -> _Layers:
    return spec.train_attn, spec.train_mlp, spec.train_unembed
