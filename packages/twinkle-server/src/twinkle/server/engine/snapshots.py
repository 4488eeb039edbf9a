"""Copies of live runs' adapters that outlive the process of the model: what each run can be set back to.

A run that has taken an optimizer step is copied some seconds later, between two ticks; the file is written behind. The
gradient that it has accumulated since is not part of the copy. Owns what is known of each run's progress, and which
of it is safe; starting the model anew and putting the copies back is `recovery`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.store.checkpoint_files import CheckpointFiles

log = logging.getLogger("twinkle.engine")

# Copies that may wait in memory for the disk: beyond these the engine waits for it, lest the memory run out.
_MAX_HELD = 8


class SnapshotFiles:
    """Snapshots on disk: files as a checkpoint has them, under ROOT/RUN. No row names them, so no list shows them."""

    def __init__(self, root: Path) -> None:
        """What an earlier process left in `root` is deleted: its runs ended with it."""
        shutil.rmtree(root, ignore_errors=True)
        self._root = root
        self._files = CheckpointFiles(root)

    def write(self, run: LiveRun, number: int, state: AdapterState) -> None:
        self._files.write(_uri(run.run_id, number), state, run.base_model)

    def read(self, run_id: str, number: int, with_optimizer: bool) -> AdapterState:
        """
        Raises:
            ServerFault, InvalidRequest: if the files are not what was written.
        """
        return self._files.read(_uri(run_id, number), with_optimizer)

    def delete(self, run_id: str, number: int) -> None:
        self._files.delete(_uri(run_id, number))

    def delete_run(self, run_id: str) -> None:
        shutil.rmtree(self._root / run_id, ignore_errors=True)

    def delete_all(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def _uri(run_id: str, number: int) -> CheckpointUri:
    return CheckpointUri(str(number), run_id, "weights")


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and how much of that would survive its process.

    Attributes:
        steps: optimizer steps that it has taken.
        safe_steps: those that are in its snapshot.
        has_gradient: whether it has accumulated a gradient since its last step.
        is_readable: False if its snapshot turned out to be damaged, so that nothing but a new adapter is left.
    """

    steps: int
    safe_steps: int
    has_gradient: bool
    is_readable: bool

    @property
    def is_safe(self) -> bool:
        """Whether the run can be had again just as it is."""
        return self.steps == self.safe_steps and not self.has_gradient and self.is_readable


@dataclass(eq=False)
class _Track:
    """A run and its latest snapshot.

    Attributes:
        held: the snapshot, until it is written.
        stored: number of the newest one that is written; numbers rise.
        has_optimizer: whether it holds AdamW's moments. (A run that loaded weights alone has none.)
        version: rises with each change of the run's state, a gradient's among them.
    """

    run: LiveRun
    steps: int = 0
    safe_steps: int = 0
    has_gradient: bool = False
    is_readable: bool = True
    held: AdapterState | None = None
    stored: int | None = None
    has_optimizer: bool = False
    version: int = 0
    has_ended: bool = False
    writing: asyncio.Task[None] | None = None


class Snapshots:
    """Every live run's progress and snapshot. Single-threaded: called on one event loop, `take_due` between ticks."""

    def __init__(
        self,
        worker: WorkerPort,
        files: SnapshotFiles | None,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            files: None keeps none, where the model's process can't end without this one.
            seconds: after a step that is in no snapshot yet, the next one is taken.
        """
        self._worker = worker
        self._files = files
        self._seconds = seconds
        self._clock = clock
        self._tracks: dict[str, _Track] = {}
        self._due: dict[str, float] = {}  # run -> when its snapshot is due
        self._writing: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ what happened to a run

    def begin(self, run: LiveRun) -> None:
        """The run's adapter was made."""
        self._tracks[run.run_id] = _Track(run)

    def accumulated(self, run_id: str) -> None:
        """A pass has added to its gradient."""
        track = self._tracks[run_id]
        track.has_gradient = True
        track.version += 1

    def stepped(self, run_id: str) -> None:
        """It has taken an optimizer step."""
        track = self._tracks[run_id]
        track.steps += 1
        track.has_gradient = False
        track.version += 1
        if self._files is not None:
            self._due.setdefault(run_id, self._clock() + self._seconds)

    def loaded(self, run_id: str, state: AdapterState) -> None:
        """Its adapter was set to `state`, which is a snapshot itself."""
        track = self._tracks[run_id]
        track.has_gradient = False
        track.version += 1
        self._hold(run_id, state)

    async def copied(self, run_id: str, state: AdapterState) -> None:
        """Somebody has copied its adapter: where a snapshot would be due, that is one."""
        track = self._tracks[run_id]
        if track.safe_steps < track.steps:
            await self._wait_for_disk()
            self._hold(run_id, replace(state, gradients=None))

    def restored(self, run_id: str) -> None:
        """It was set back to its snapshot, or to a new adapter if it has none."""
        track = self._tracks[run_id]
        track.steps = track.safe_steps
        track.has_gradient = False
        track.is_readable = True
        track.version += 1
        self._due.pop(run_id, None)

    def forget(self, run_id: str) -> None:
        """The run has ended; its snapshot is deleted."""
        self._due.pop(run_id, None)
        track = self._tracks.pop(run_id, None)
        if track is not None and self._files is not None:
            track.has_ended = True
            self._write_behind(track, self._files)

    # ------------------------------------------------------------ taking

    def seconds_until_due(self) -> float | None:
        """How long until `take_due` has something to do; None if nothing will be."""
        return max(0.0, min(self._due.values()) - self._clock()) if self._due else None

    async def take_due(self) -> None:
        """Copy the adapters whose time has come.

        Raises:
            WorkerLost: as the worker.
        """
        now = self._clock()
        for run_id in [run_id for run_id, due_at in self._due.items() if due_at <= now]:
            await self._wait_for_disk()
            try:
                state = await self._worker.export_adapter(run_id, with_optimizer=True)
            except WorkerLost:
                raise
            except Exception:  # the run goes on; after its next step this is tried again
                log.exception("no snapshot of run %s could be taken", run_id)
            else:
                self._hold(run_id, state)
            self._due.pop(run_id, None)

    async def _wait_for_disk(self) -> None:
        """Until there is room in memory for one more copy."""
        while sum(track.held is not None for track in self._tracks.values()) >= _MAX_HELD and self._writing:
            await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)

    def _hold(self, run_id: str, state: AdapterState) -> None:
        """`state` is all there is to the run, but for a gradient."""
        track = self._tracks[run_id]
        track.safe_steps = track.steps
        self._due.pop(run_id, None)
        if self._files is not None:
            track.held = state
            track.has_optimizer = state.optimizer is not None
            self._write_behind(track, self._files)

    # ------------------------------------------------------------ writing

    def _write_behind(self, track: _Track, files: SnapshotFiles) -> None:
        """Write what is held, or delete everything if the run has ended; work on one run never overlaps."""
        if track.writing is None:
            track.writing = asyncio.create_task(self._write(track, files))
            self._writing.add(track.writing)
            track.writing.add_done_callback(self._writing.discard)

    async def _write(self, track: _Track, files: SnapshotFiles) -> None:
        run_id = track.run.run_id
        try:
            while (state := track.held) is not None and not track.has_ended:
                number = 0 if track.stored is None else track.stored + 1
                await asyncio.to_thread(files.write, track.run, number, state)
                old, track.stored = track.stored, number
                if track.held is state:  # else a newer one has come meanwhile
                    track.held = None
                if old is not None:
                    await asyncio.to_thread(files.delete, run_id, old)
        except Exception:  # it stays in memory, where it can be used
            log.exception("the snapshot of run %s could not be written", run_id)
        finally:
            track.writing = None
        if track.has_ended:
            await asyncio.to_thread(files.delete_run, run_id)

    async def close(self) -> None:
        """The runs end with this process, and so do their snapshots."""
        while self._writing:
            await asyncio.wait(set(self._writing))
        if self._files is not None:
            await asyncio.to_thread(self._files.delete_all)

    # ------------------------------------------------------------ what can be had again

    def runs(self) -> list[LiveRun]:
        """Those whose adapters were made."""
        return [track.run for track in self._tracks.values()]

    def progress(self, run_id: str) -> Progress:
        track = self._tracks[run_id]
        return Progress(track.steps, track.safe_steps, track.has_gradient, track.is_readable)

    def version(self, run_id: str) -> int:
        """While it is the same, so is the run's state."""
        return self._tracks[run_id].version

    async def read(self, run_id: str) -> AdapterState | None:
        """The run's snapshot; None if a new adapter is all that it can be set back to."""
        track = self._tracks[run_id]
        if track.held is not None or track.stored is None or self._files is None:
            return track.held
        try:
            return await asyncio.to_thread(self._files.read, run_id, track.stored, track.has_optimizer)
        except (TwinkleError, OSError) as error:
            log.error("the snapshot of run %s can't be read: %s", run_id, error)
            track.stored, track.safe_steps, track.is_readable = None, 0, False
            return None
