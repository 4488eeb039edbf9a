"""The service's background tasks, which run until it is closed: the engine's loop, and periodic work."""

from __future__ import annotations

import asyncio
import logging

from twinkle.protocol.errors import Unavailable
from twinkle.server.service.parts import Parts
from twinkle.server.service.session_expiry import pause_gone, release_vanished

log = logging.getLogger("twinkle.server")

_SWEEP_SECONDS = 60.0
_LOOK_SECONDS = 5.0

_STUCK = (
    "model_id: run {} is lost: its request {} never arrived after the server had been started again, though later ones "
    "did, so it was probably accepted before and lost with the disk or the power; begin a new run from its last "
    "checkpoint"
)


class Background:
    """Single-threaded: on the service's event loop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        parts = self._parts
        work = (parts.ledger.run(), parts.compaction.run(), self._sweep(), self._release(), self._look())
        self._tasks = [asyncio.create_task(task) for task in work]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        try:
            await self._parts.checkpoints.delete_leftovers()
        except Exception:  # the next start is another attempt
            log.exception("what killed processes had left in the storage could not be deleted")
        while True:
            try:
                await self._parts.checkpoints.sweep()
            except Exception:  # the next attempt is soon
                log.exception("expired checkpoints could not be deleted")
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _release(self) -> None:
        """In a task of its own, since it waits for the vanished clients' last saves."""
        while True:
            try:
                await release_vanished(self._parts)
            except Exception:  # the next attempt is soon
                log.exception("runs of clients that have vanished could not be released")
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _look(self) -> None:
        """Pause samples that nobody waits for, and end runs that wait in vain."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                pause_gone(self._parts)
                end_stuck_runs(self._parts)
            except Exception:  # the next attempt is soon
                log.exception("samples without a client and stuck runs could not be ended")


def end_stuck_runs(parts: Parts) -> None:
    """Declare lost the runs whose next request is missing, and was lost if it was ever accepted."""
    for run, missing in parts.live.stuck():
        reason = _STUCK.format(run.run_id, missing)
        log.error("%s", reason)
        try:
            parts.live.lose(run, reason)
        except Unavailable as error:  # it accepts nothing more anyway, and ends with its session
            log.warning("%s", error.message)
