"""Keeps the journal of accepted requests and their outcomes short.

A segment is deleted once the runs' snapshots include everything in it; what is still needed (results that may be
fetched, requests that wait) is rewritten before that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.scheduling import records
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import Accepted, Begun, Done, Lost, Record, Rejected, RunLog
from twinkle.server.scheduling.runs import Run
from twinkle.server.store.journal import Journal

log = logging.getLogger("twinkle.server")

_CLEAN_SECONDS = 5.0
# A segment is left alone for this long, unless there are many: by then most results have been fetched and need no
# rewriting.
_REST_SECONDS = 900.0
_MAX_RESTING = 16


class Compaction:
    """Single-threaded: called on one event loop."""

    def __init__(self, live: LiveRuns, futures: FutureTable, snapshots: Snapshots, run_log: RunLog) -> None:
        self._live = live
        self._futures = futures
        self._snapshots = snapshots
        self._log = run_log
        self._damaged: set[int] = set()  # segments that were damaged at start-up
        self._sealed_since: dict[int, float] = {}
        # One damaged since then: its records are in memory here, but the next process must see that they are missing.
        self._unknown_damage: int | None = None

    def read_earlier(self, journal: Journal) -> tuple[list[tuple[int, Record]], bool]:
        """All earlier records with their segments, oldest first, and whether any may be missing. Blocking."""
        read: list[tuple[int, Record]] = []
        for segment in journal.earlier:
            found = journal.examine(segment)
            if found.is_damaged:
                self._damaged.add(segment)
            read += ((segment, records.decode(payload)) for payload in found.payloads)
        return read, bool(self._damaged)

    async def run(self) -> None:
        """Flush and clean, forever."""
        journal = self._log.journal
        if journal is None:
            return
        flushing = asyncio.create_task(journal.run())
        try:
            while True:
                await asyncio.sleep(_CLEAN_SECONDS)
                try:
                    await self.clean()
                except Exception:  # the next attempt is soon
                    log.exception("the journal could not be shortened")
        finally:
            flushing.cancel()

    async def clean(self, max_resting: int = _MAX_RESTING) -> None:
        """Delete the segments that are no longer needed, oldest first.

        Args:
            max_resting: this many of the newest are left alone for a while.
        """
        journal = self._log.journal
        if journal is None or self._unknown_damage is not None:
            return
        sealed, now = journal.sealed(), time.monotonic()
        self._sealed_since = {segment: self._sealed_since.get(segment, now) for segment in sealed}
        for place, segment in enumerate(sealed):
            if len(sealed) - place <= max_resting and now - self._sealed_since[segment] < _REST_SECONDS:
                return
            waited_for = [run for run in self._live if _has_unsaved_of(run, segment)]
            for run in waited_for:
                self._snapshots.hurry(run)
            if waited_for:
                return  # keep later ones too: a request whose outcome is gone would be done again
            found = await asyncio.to_thread(journal.examine, segment)
            if found.is_damaged and segment not in self._damaged:
                self._unknown_damage = segment
                return
            for payload in found.payloads:
                self._keep_if_needed(records.decode(payload))
            # What was rewritten must be durable before its only other copy is deleted.
            await journal.wait_durable()
            journal.delete(segment)
            for run in self._live:
                run.logged.pop(segment, None)

    def _keep_if_needed(self, record: Record) -> None:
        """Rewrite a record of an old segment if it may still be needed."""
        match record:
            case Begun(run_id=run_id) if run_id in self._live:
                self._log.append(record)
            case Accepted(request_id=request_id):
                run = self._live.get(record.run_id)
                # Without a snapshot, its creation is all there is of a run.
                is_in_snapshot = run is not None and 0 < (run.snapshot.stored or 0) >= record.seq_id
                if self._futures.is_pending(request_id) or (run is not None and not is_in_snapshot):
                    self._rewrite(record, run)
                elif self._futures.is_known(request_id):  # for a sample, it tells whose it was
                    self._rewrite(record if record.run_id is None else replace(record, body=None), run)
            case Rejected(run_id, seq_id):
                run = self._live.get(run_id)
                if run is not None and seq_id > (run.snapshot.stored or 0):
                    self._log.append(record)
            case Lost(lost) if lost.run_id in self._live.lost:
                self._log.append(record)
            case Done(outcomes):
                known = [outcome for outcome in outcomes if self._futures.is_known(outcome[0])]
                if known:
                    self._log.append(Done(known))
            case _:
                pass

    def _rewrite(self, record: Accepted, run: Run | None) -> None:
        self._log.append(record)
        if run is not None and self._log.journal is not None:
            run.note_logged(self._log.journal.segment, record.seq_id)


def _has_unsaved_of(run: Run, segment: int) -> bool:
    """Whether requests in this segment have changed the run since its snapshot on disk."""
    return (run.snapshot.stored or 0) < min(run.logged.get(segment, 0), run.changed)
