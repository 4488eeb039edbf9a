"""Copies of live runs, taken between ticks: what each can go on from when its adapter is no longer on the worker.

A copy is the whole state behind one of the run's requests, moments and gradient included. One is taken some seconds
after a run has changed, and written behind; what was computed since is in `history`. Owns what is known of each run's
state and its copies; putting one onto the worker is `residency`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from twinkle.protocol.errors import ServerFault
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.history import History
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.jobs import Job
from twinkle.server.store.run_files import RunFiles

log = logging.getLogger("twinkle.engine")

# Copies that may wait in memory for the disk: beyond these the engine waits for it, lest the memory run out.
_MAX_HELD = 8
# Copying stops the engine: at most this share of its time.
_MAX_SHARE = 0.02
# ... but one that took long for once (a process that was stopped) is not to keep runs without copies.
_LONGEST_SECONDS = 60.0
# A run that has come so far since its copy is copied at once, so that what is to be computed again stays bounded.
_MAX_JOBS, _MAX_TOKENS = 512, 2**20
# After a write has failed the disk is left alone for so long.
_RETRY_SECONDS = 10.0


@dataclass(eq=False)
class _Track:
    """A run and its latest copy. Numbers are the `seq_id` of the request behind which a state is.

    Attributes:
        changed: of its state; 0 is a new adapter's.
        held: the copy, until it is written.
        stored: of the newest copy on disk.
        since: requests and tokens computed since the copy.
        seconds: what the last copy cost the engine.
        lost: the state can't be had any more, for this reason.
    """

    run: LiveRun
    changed: int = 0
    has_gradient: bool = False
    held: tuple[int, AdapterState] | None = None
    stored: int | None = None
    since: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    lost: str | None = None
    has_ended: bool = False
    writing: asyncio.Task[None] | None = None

    @property
    def copied(self) -> int:
        """Number of the newest copy; a new adapter needs none, since its seed makes it again."""
        return self.held[0] if self.held is not None else self.stored or 0


@dataclass(eq=False)
class Snapshots:
    """Single-threaded: called on one event loop, `take_due` between ticks.

    Attributes:
        files: None keeps no copies.
        seconds: how long after a change a copy is taken; None takes none but those that are asked for.
        settled: returns when all that a run's requests write to disk is written. A copy says that everything before it
            is done.
    """

    worker: WorkerPort
    files: RunFiles | None
    seconds: float | None
    history: History = field(default_factory=History)
    clock: Callable[[], float] = time.monotonic
    settled: Callable[[str], Awaitable[None]] | None = None
    _tracks: dict[str, _Track] = field(default_factory=dict[str, _Track])
    _due: dict[str, float] = field(default_factory=dict[str, float])  # run -> when its copy is due
    _writing: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])

    # ------------------------------------------------------------ what happened to a run

    def begin(self, run: LiveRun, stored: int | None = None) -> None:
        """The run's adapter was made, or is on disk as it was behind request `stored`."""
        self._tracks[run.run_id] = _Track(run, changed=stored or 0, stored=stored)

    def changed(self, jobs: list[Job], has_gradient: bool) -> None:
        """The jobs, computed in one call, have changed their runs' states."""
        if self.files is None:
            return
        if self.seconds is not None:  # else nothing can be lost
            self.history.add(jobs)
        for job in jobs:
            track = self._tracks[job.run_id]
            track.changed, track.has_gradient = job.seq_id, has_gradient
            count, tokens = track.since
            track.since = count + 1, tokens + job.tokens
            if self.seconds is not None:
                self._set_due(track)

    def _set_due(self, track: _Track) -> None:
        count, tokens = track.since
        run_id = track.run.run_id
        if run_id not in self._due:
            costs = track.seconds + sum(self._tracks[other].seconds for other in self._due)
            self._due[run_id] = self.clock() + max(
                self.seconds or 0.0, min(costs / _MAX_SHARE, _LONGEST_SECONDS)
            )
        elif count >= _MAX_JOBS or tokens >= _MAX_TOKENS:
            self._due[run_id] = min(self._due[run_id], self.clock())

    async def loaded(self, job: Job, state: AdapterState) -> None:
        """The job has set its run to `state`; returns when that is safe, since what it was read from may go."""
        track = self._tracks[job.run_id]
        track.changed, track.has_gradient = job.seq_id, False
        if self.files is not None:
            self._hold(track, state)
            await self.written(job.run_id)

    def worker_lost(self, run_id: str) -> None:
        """The run's adapter is gone: its state is that of its copy."""
        track = self._tracks[run_id]
        track.changed = track.copied
        track.since = (0, 0)
        self._due.pop(run_id, None)

    def brought_back(self, run_id: str, state: AdapterState | None) -> None:
        """The run is on the worker as its copy is; None is a new adapter."""
        self._tracks[run_id].has_gradient = state is not None and state.gradients is not None

    def give_up(self, run_id: str, reason: str) -> None:
        """The run's state is lost; whoever wants it is told the reason."""
        self._tracks[run_id].lost = reason
        self._due.pop(run_id, None)
        self.history.forget(run_id)

    def forget(self, run_id: str) -> None:
        """The run has ended; its copies are deleted."""
        self._due.pop(run_id, None)
        self.history.forget(run_id)
        track = self._tracks.pop(run_id, None)
        if track is not None and self.files is not None:
            track.has_ended = True
            self._write_behind(track, self.files)

    # ------------------------------------------------------------ taking

    def seconds_until_due(self) -> float | None:
        """How long until `take_due` has something to do; None if nothing will be."""
        return max(0.0, min(self._due.values()) - self.clock()) if self._due else None

    async def take_due(self) -> None:
        """Copy the adapters whose time has come.

        Raises:
            WorkerLost: as the worker.
        """
        now = self.clock()
        for run_id in [run_id for run_id, due_at in self._due.items() if due_at <= now]:
            try:
                await self.take(run_id)
            except WorkerLost:
                raise
            except Exception:  # the run goes on
                log.exception("no copy of run %s could be taken", run_id)
                self._due[run_id] = self.clock() + _RETRY_SECONDS

    def hurry(self, run_id: str) -> None:
        """A copy of the run is wanted as soon as can be, if it has changed since the last."""
        track = self._tracks.get(run_id)
        if track is not None and self.seconds is not None and track.copied < track.changed:
            self._due[run_id] = self.clock()

    async def take(self, run_id: str) -> None:
        """Copy a run that is on the worker, if it has changed since its last copy; the file is written behind.

        Raises:
            Exception: what the worker raises.
        """
        track = self._tracks[run_id]
        self._due.pop(run_id, None)
        if track.copied >= track.changed:
            if track.held is not None and self.files is not None:  # it could not be written
                self._write_behind(track, self.files)
            return
        await self._wait_for_disk()
        began = self.clock()
        state = await self.worker.export_adapter(
            run_id, with_optimizer=True, with_gradients=track.has_gradient
        )
        track.seconds = self.clock() - began
        self._hold(track, state)

    async def _wait_for_disk(self) -> None:
        """Until there is room in memory for one more copy."""
        while sum(track.held is not None for track in self._tracks.values()) >= _MAX_HELD and self._writing:
            await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)

    def _hold(self, track: _Track, state: AdapterState) -> None:
        """`state` is all there is to the run now."""
        run_id = track.run.run_id
        self._due.pop(run_id, None)
        self.history.covered(run_id, track.changed)
        track.since = (0, 0)
        if self.files is not None:
            track.held = track.changed, state
            self._write_behind(track, self.files)

    # ------------------------------------------------------------ writing

    def _write_behind(self, track: _Track, files: RunFiles) -> None:
        """Write what is held, or delete everything if the run has ended; work on one run never overlaps."""
        if track.writing is None:
            track.writing = asyncio.create_task(self._write(track, files))
            self._writing.add(track.writing)
            track.writing.add_done_callback(self._writing.discard)

    async def _write(self, track: _Track, files: RunFiles) -> None:
        run_id = track.run.run_id
        try:
            while (held := track.held) is not None and not track.has_ended:
                number, state = held
                if self.settled is not None:
                    await self.settled(run_id)
                await asyncio.to_thread(files.write, run_id, number, state)
                track.stored = number
                if track.held is held:  # else a newer one has come meanwhile
                    track.held = None
                await asyncio.to_thread(files.delete_older, run_id, number)
        except Exception as error:  # it stays in memory, where it can be used
            log.warning("the copy of run %s could not be written to disk: %s", run_id, error)
            if self.seconds is not None and run_id in self._tracks:
                self._due[run_id] = self.clock() + _RETRY_SECONDS
        finally:
            track.writing = None
        if track.has_ended:
            await asyncio.to_thread(files.delete_run, run_id)

    async def written(self, run_id: str) -> bool:
        """Wait until what is held of a run is on disk; False if it couldn't be written."""
        track = self._tracks[run_id]
        if track.held is not None and self.files is not None:
            self._write_behind(track, self.files)
        while track.writing is not None:
            await asyncio.wait({track.writing})
        return track.held is None

    async def close(self) -> None:
        """Wait until all that is being written is written."""
        while self._writing:
            await asyncio.wait(set(self._writing))

    # ------------------------------------------------------------ what there is

    def has_gradient(self, run_id: str) -> bool:
        """Whether a run has accumulated a gradient since its last step."""
        track = self._tracks.get(run_id)
        return track is not None and track.has_gradient

    def stored(self, run_id: str) -> int:
        """The newest request of a run that a copy on disk has; 0 if there is none."""
        track = self._tracks.get(run_id)
        return track.stored or 0 if track is not None else 0

    def last_change(self, run_id: str) -> int:
        """The newest request that changed a run."""
        track = self._tracks.get(run_id)
        return track.changed if track is not None else 0

    def changed_runs(self) -> list[str]:
        """Those with a state that no copy has."""
        return [run_id for run_id, track in self._tracks.items() if track.copied < track.changed]

    async def read(self, run_id: str) -> AdapterState | None:
        """The run's copy; None if it is a new adapter still.

        Raises:
            ServerFault: if it can't be read.
        """
        track = self._tracks[run_id]
        if track.lost is not None:
            raise ServerFault(track.lost)
        if track.held is not None:
            return track.held[1]
        if track.stored is None or self.files is None:
            return None
        return await asyncio.to_thread(self.files.read, run_id, track.stored)
