"""What a service sees to again and again, beside what it is asked for: each chore in a task of its own, for ever."""

from __future__ import annotations

import asyncio
import logging

from twinkle.protocol.errors import Unavailable
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.engine.compaction import Compaction
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.service.session_desk import SessionDesk
from twinkle.server.store.ledger import Ledger

log = logging.getLogger("twinkle.server")

_SWEEP_SECONDS = 60.0
_LOOK_SECONDS = 5.0

_STUCK = (
    "model_id: run {} is lost: its request {} never arrived after the server had been started again, though later ones "
    "did, so it was probably accepted before and lost with the disk or the power; begin a new run from its last "
    "checkpoint"
)


class Chores:
    """Single-threaded: on the service's event loop."""

    def __init__(
        self,
        ledger: Ledger,
        compaction: Compaction,
        checkpoints: Checkpoints,
        sessions: SessionDesk,
        live: LiveRuns,
    ) -> None:
        self._ledger = ledger
        self._compaction = compaction
        self._checkpoints = checkpoints
        self._sessions = sessions
        self._live = live
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        chores = (self._ledger.run(), self._compaction.run(), self._sweep(), self._release(), self._look())
        self._tasks = [asyncio.create_task(chore) for chore in chores]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        """Delete what has expired."""
        while True:
            try:
                await self._checkpoints.sweep()
            except Exception:  # the next time is soon
                log.exception("expired checkpoints could not be deleted")
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _release(self) -> None:
        """Let go of those who have vanished. It waits for their last saves, and nothing else waits for it."""
        while True:
            try:
                await self._sessions.release_vanished()
            except Exception:  # the next time is soon
                log.exception("runs of clients that have vanished could not be released")
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _look(self) -> None:
        """See to samples that nobody waits for, and to runs that wait in vain."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                self._sessions.pause_gone()
                self.end_stuck_runs()
            except Exception:  # the next time is soon
                log.exception("who waits in vain could not be seen to")

    def end_stuck_runs(self) -> None:
        """A run whose next request is not there, and was lost if it was ever accepted, is lost."""
        for run, missing in self._live.stuck():
            reason = _STUCK.format(run.run_id, missing)
            log.error("%s", reason)
            try:
                self._live.lose(run, reason)
            except Unavailable as error:  # it takes nothing more all the same, and ends with its session
                log.warning("%s", error.message)
