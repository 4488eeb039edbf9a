"""Snapshots of live runs, taken between calls: what a run is restored from once its adapter has left the worker.

A snapshot is the whole state after one of the run's requests, moments and gradient included. It is taken some seconds
after a run has changed, and written in the background; what was computed since is `Run.unsaved`, and is computed again
if only the snapshots are left. `residency` restores snapshots to the worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from twinkle.protocol.errors import ServerFault
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.runs import Job, Run
from twinkle.server.store.retry import retry_while_unavailable
from twinkle.server.store.run_files import RunFiles

log = logging.getLogger("twinkle.engine")

# Snapshots that may wait in memory for the disk; beyond that the engine waits, so that memory doesn't run out.
_MAX_HELD = 8
# Taking snapshots stops the engine: at most for this share of its time.
_MAX_SHARE = 0.02
# ... but one that took unusually long (the process was stopped) must not leave runs without snapshots.
_LONGEST_SECONDS = 60.0
# A run that changed this much since its snapshot gets one at once, which bounds what has to be computed again.
_MAX_JOBS, _MAX_TOKENS = 512, 2**20
# After a failed write the disk is left alone for this long.
_RETRY_SECONDS = 10.0
# All runs wait while one is read.
_READ_SECONDS = 60.0


@dataclass(eq=False)
class Snapshots:
    """Single-threaded: called on one event loop, `take_due` between ticks.

    Attributes:
        files: None keeps no snapshots.
        seconds: how long after a change a snapshot is taken; None takes only those that are asked for.
    """

    worker: WorkerPort
    files: RunFiles | None
    seconds: float | None
    clock: Callable[[], float] = time.monotonic
    _due: dict[Run, float] = field(default_factory=dict[Run, float])  # when each one's snapshot is due
    _unsaved: set[Run] = field(default_factory=set[Run])  # those with anything in `Run.unsaved`
    _held: set[Run] = field(default_factory=set[Run])  # those whose snapshot is not on disk yet
    _writing: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    _calls: int = 0

    # ------------------------------------------------------------ what happened to a run

    def computed(self, passes: Sequence[Job], steps: Sequence[Job] = ()) -> None:
        """Passes and the steps after them, computed in one call, have changed their runs' states."""
        if self.files is None:
            return
        self._calls += 1
        for place, job in enumerate((*passes, *steps)):
            run, snapshot = job.run, job.run.snapshot
            # A refused step has dropped its gradient too.
            run.changed, run.has_gradient = job.seq_id, place < len(passes)
            snapshot.jobs_since += 1
            snapshot.tokens_since += job.tokens
            if self.seconds is not None:  # otherwise nothing can be lost
                run.unsaved.append((self._calls, place, job))
                self._unsaved.add(run)
                self._set_due(run)

    def _set_due(self, run: Run) -> None:
        if run not in self._due:
            costs = run.snapshot.seconds + sum(other.snapshot.seconds for other in self._due)
            self._due[run] = self.clock() + max(
                self.seconds or 0.0, min(costs / _MAX_SHARE, _LONGEST_SECONDS)
            )
        elif run.snapshot.jobs_since >= _MAX_JOBS or run.snapshot.tokens_since >= _MAX_TOKENS:
            self._due[run] = min(self._due[run], self.clock())

    async def loaded(self, job: Job, state: AdapterState) -> None:
        """The job has set its run to `state`; returns when that is safe, since the checkpoint may be deleted."""
        job.run.changed, job.run.has_gradient = job.seq_id, False
        if self.files is not None:
            self._hold(job.run, state)
            await self.written(job.run)

    def worker_lost(self, run: Run) -> None:
        """The run's adapter is gone: its state is its snapshot's."""
        run.changed = run.snapshot.number
        run.snapshot.jobs_since = run.snapshot.tokens_since = 0
        self._due.pop(run, None)

    def take_unsaved(self) -> list[tuple[Job, ...]]:
        """Take out what was computed since the runs' snapshots, call by call in order.

        The same jobs in the same calls give the same numbers, bit for bit if all runs of a call take part again.
        """
        found = [item for run in self._unsaved for item in run.unsaved]
        for run in self._unsaved:
            run.unsaved = deque()
        self._unsaved.clear()
        found.sort(key=lambda item: item[:2])
        return [tuple(job for _, _, job in call) for _, call in groupby(found, key=lambda item: item[0])]

    def drop(self, run: Run) -> None:
        """The run has ended or is lost: nothing of it is computed again. If it has ended, its snapshots go too."""
        self._due.pop(run, None)
        run.unsaved.clear()
        self._unsaved.discard(run)
        has_any = run.snapshot.stored is not None or run.snapshot.held is not None
        if run.has_ended and has_any and self.files is not None:
            self._write_behind(run, self.files)

    def _forget_unsaved(self, run: Run, seq_id: int) -> None:
        """What the run changed up to `seq_id` need not be computed again."""
        while run.unsaved and run.unsaved[0][2].seq_id <= seq_id:
            run.unsaved.popleft()
        if not run.unsaved:
            self._unsaved.discard(run)

    # ------------------------------------------------------------ taking

    def seconds_until_due(self) -> float | None:
        """Seconds until `take_due` has something to do; None if nothing is due."""
        return max(0.0, min(self._due.values()) - self.clock()) if self._due else None

    async def take_due(self) -> None:
        """Take the snapshots that are due.

        Raises:
            WorkerLost: as the worker.
        """
        now = self.clock()
        for run in [run for run, due_at in self._due.items() if due_at <= now]:
            try:
                await self.take(run)
            except WorkerLost:
                raise
            except Exception:  # the run goes on
                log.exception("no snapshot of run %s could be taken", run.run_id)
                self._due[run] = self.clock() + _RETRY_SECONDS

    def hurry(self, run: Run) -> None:
        """Take a snapshot of the run as soon as possible, if it has changed since the last."""
        if self.seconds is not None and run.is_ahead_of_snapshot:
            self._due[run] = self.clock()

    async def take(self, run: Run) -> None:
        """Take a snapshot of a resident run, if it has changed since its last one; it is written in the background.

        Raises:
            Exception: what the worker raises.
        """
        self._due.pop(run, None)
        if not run.is_ahead_of_snapshot:
            if run.snapshot.held is not None and self.files is not None:  # it could not be written
                self._write_behind(run, self.files)
            return
        await self._wait_for_disk()
        began = self.clock()
        state = await self.worker.export_adapter(
            run.run_id, with_optimizer=True, with_gradients=run.has_gradient
        )
        run.snapshot.seconds = self.clock() - began
        self._hold(run, state)

    async def _wait_for_disk(self) -> None:
        """Wait until there is room in memory for one more snapshot."""
        while len(self._held) >= _MAX_HELD and self._writing:
            await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)

    def _hold(self, run: Run, state: AdapterState) -> None:
        """Make `state` the run's newest snapshot."""
        self._due.pop(run, None)
        self._forget_unsaved(run, run.changed)
        run.snapshot.jobs_since = run.snapshot.tokens_since = 0
        if self.files is not None:
            run.snapshot.held = run.changed, state
            self._held.add(run)
            self._write_behind(run, self.files)

    # ------------------------------------------------------------ writing

    def _write_behind(self, run: Run, files: RunFiles) -> None:
        """Write what is held, or delete everything if the run has ended; one run's writes never overlap."""
        if run.snapshot.writing is None:
            task = run.snapshot.writing = asyncio.create_task(self._write(run, files))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write(self, run: Run, files: RunFiles) -> None:
        snapshot = run.snapshot
        try:
            while (held := snapshot.held) is not None and not run.has_ended:
                number, state = held
                # A snapshot implies that everything before it is done, so the run's checkpoints are written first.
                await run.settled()
                await asyncio.to_thread(files.write, run.run_id, number, state)
                snapshot.stored = number
                if snapshot.held is held:  # otherwise there is a newer one by now
                    snapshot.held = None
                await asyncio.to_thread(files.delete_older, run.run_id, number)
        except Exception as error:  # it stays in memory, where it can be used
            log.warning("the snapshot of run %s could not be written to disk: %s", run.run_id, error)
            if self.seconds is not None and not run.has_ended:
                self._due[run] = self.clock() + _RETRY_SECONDS
        finally:
            snapshot.writing = None
        if run.has_ended:
            snapshot.held = None
            await asyncio.to_thread(files.delete_run, run.run_id)
        if snapshot.held is None:
            self._held.discard(run)

    async def written(self, run: Run) -> bool:
        """Wait until a run's held snapshot is on disk; returns False if it couldn't be written."""
        if run.snapshot.held is not None and self.files is not None:
            self._write_behind(run, self.files)
        while run.snapshot.writing is not None:
            await asyncio.wait({run.snapshot.writing})
        return run.snapshot.held is None

    async def close(self, runs: Iterable[Run] = ()) -> None:
        """Wait until everything is written.

        Args:
            runs: first, a snapshot is taken of each that has changed.
        """
        for run in runs:
            try:
                await self.take(run)
            except Exception as error:  # what is missing is computed again
                log.warning("no last snapshot of run %s could be taken: %s", run.run_id, error)
        while self._writing:
            await asyncio.wait(set(self._writing))

    # ------------------------------------------------------------ reading

    async def read(self, run: Run) -> AdapterState | None:
        """The run's snapshot; None if it is still a new adapter.

        Raises:
            ServerFault: if it can't be read.
            Unavailable: if the files can't be reached for a minute.
        """
        if run.lost is not None:
            raise ServerFault(run.lost)
        if run.snapshot.held is not None:
            return run.snapshot.held[1]
        if run.snapshot.stored is None or self.files is None:
            return None
        files, number = self.files, run.snapshot.stored
        return await retry_while_unavailable(lambda: files.read(run.run_id, number), _READ_SECONDS)
