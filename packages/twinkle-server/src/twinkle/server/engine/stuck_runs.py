"""Runs that an earlier process had, and that wait for a request which will never come.

A request that was answered and whose record was lost with a disk, or with the power, is not sent again: its client goes
on with the next, which would wait for ever. So a run that was brought back may wait for a missing request only so long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from twinkle.server.scheduling.scheduler import Scheduler

# A client that was away sends all that it has again, within seconds; large requests may be on their way for longer.
_PATIENCE_SECONDS = 120.0


class StuckRuns:
    """Single-threaded: called on one event loop."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._since: dict[str, tuple[int, float] | None] = {}  # run -> what it waits for, and since when

    def restored(self, run_ids: Iterable[str]) -> None:
        """These runs were brought back from a journal."""
        self._since.update(dict.fromkeys(run_ids))

    def look(self) -> dict[str, int]:
        """The runs that have waited for too long, each with the `seq_id` that it waits for."""
        stuck: dict[str, int] = {}
        for run_id, waiting in list(self._since.items()):
            if not self._scheduler.has_run(run_id):
                del self._since[run_id]
                continue
            missing = self._scheduler.queue(run_id).missing
            if missing is None:
                self._since[run_id] = None
            elif waiting is None or waiting[0] != missing:
                self._since[run_id] = missing, self._clock()
            elif self._clock() - waiting[1] >= _PATIENCE_SECONDS:
                stuck[run_id] = missing
                del self._since[run_id]
        return stuck
