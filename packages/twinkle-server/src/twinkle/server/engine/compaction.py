"""The journal of accepted requests and their outcomes, kept as short as may be.

What the service answers for is written before it is answered; `restore` reads it when a server starts. A segment goes
when the runs' copies have all that it tells of them; what of it is still needed (results that may be fetched, requests
that wait) is written once more before that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Unavailable
from twinkle.server.engine.runs import LiveRun, LostRun
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.scheduling import records
from twinkle.server.scheduling.futures import FutureTable, Outcome
from twinkle.server.scheduling.jobs import Job
from twinkle.server.scheduling.records import Accepted, Begun, Done, Ended, Lost, Record, Rejected
from twinkle.server.store.journal import Journal

log = logging.getLogger("twinkle.server")

_CLEAN_SECONDS = 5.0
# A segment is left alone for so long, unless there are many: results that were fetched are of no use soon, and need not
# be written once more then.
_REST_SECONDS = 900.0
_MAX_RESTING = 16


class RunLog:
    """Single-threaded: called on one event loop. Until there is a journal nothing is written."""

    def __init__(
        self,
        runs: Mapping[str, LiveRun],
        futures: FutureTable,
        snapshots: Snapshots,
        lost: Mapping[str, LostRun],
    ) -> None:
        """
        Args:
            lost: runs that can't go on, by id.
        """
        self._journal: Journal | None = None
        self._runs = runs
        self._futures = futures
        self._snapshots = snapshots
        self._lost = lost
        self._damaged: set[int] = set()  # segments that were found so
        self._latest: dict[int, dict[str, int]] = {}  # segment -> run -> its last request in there
        self._sealed_since: dict[int, float] = {}
        self._is_full = False
        # One that was damaged since: what it said is in memory here, and the next process is to see that it is missing.
        self._unknown_damage: int | None = None
        futures.keep = self.done

    def open(self, journal: Journal) -> None:
        """Write to `journal` from now on."""
        self._journal = journal

    def read_earlier(self, journal: Journal) -> tuple[list[tuple[int, Record]], bool]:
        """All that earlier processes wrote, with its segments, oldest first, and whether any of it may be missing.
        Blocking.
        """
        read: list[tuple[int, Record]] = []
        for segment in journal.earlier:
            found = journal.examine(segment)
            if found.is_damaged:
                self._damaged.add(segment)
            read += ((segment, records.decode(payload)) for payload in found.payloads)
        return read, bool(self._damaged)

    # ------------------------------------------------------------ what happens

    def begun(self, run: LiveRun) -> None:
        """
        Raises:
            Unavailable: if it can't be written.
        """
        self._append(Begun(run))

    def accepted(self, job: Job, body: bytes | None) -> None:
        """
        Args:
            body: of its request, as it was received; None if it was made here.

        Raises:
            Unavailable: if it can't be written; then it is not accepted.
        """
        if self._journal is not None:
            self._append(
                records.accepted(
                    job.request_id,
                    job.tenant,
                    job.run_id,
                    job.seq_id,
                    job.request,
                    body,
                    job.tokens,
                    job.digest,
                )
            )
            self._note(self._journal.segment, job.run_id, job.seq_id)

    def accepted_on_no_run(
        self, request_id: str, tenant: str, seq_id: int, request: m.Operation, body: bytes | None
    ) -> None:
        """
        Raises:
            Unavailable: as `accepted`.
        """
        if self._journal is not None:
            self._append(records.accepted(request_id, tenant, None, seq_id, request, body))

    def rejected(self, run_id: str, seq_id: int) -> None:
        self._try(Rejected(run_id, seq_id))

    def done(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
        """What came of one call; if it can't be written it is computed again after a crash."""
        if self._journal is not None:
            self._try(records.done(outcomes))

    def ended(self, run_id: str) -> None:
        self._try(Ended(run_id))

    def lost(self, run: LostRun) -> None:
        self._try(Lost(run))

    async def answered(self) -> None:
        """Wait until what was accepted may be answered."""
        if self._journal is not None:
            await self._journal.answered()

    def _append(self, record: Record) -> None:
        if self._journal is not None:
            self._journal.append(records.encode(record))
            self._is_full = False

    def _try(self, record: Record) -> None:
        try:
            self._append(record)
        except Unavailable as error:
            if not self._is_full:
                log.error("%s", error.message)
            self._is_full = True

    def _note(self, segment: int, run_id: str, seq_id: int) -> None:
        latest = self._latest.setdefault(segment, {})
        latest[run_id] = max(seq_id, latest.get(run_id, 0))

    # ------------------------------------------------------------ keeping it short

    async def run(self) -> None:
        """Flush and clean, for ever."""
        if self._journal is None:
            return
        flushing = asyncio.create_task(self._journal.run())
        try:
            while True:
                await asyncio.sleep(_CLEAN_SECONDS)
                try:
                    await self.clean()
                except Exception:  # the next time is soon
                    log.exception("the journal could not be shortened")
        finally:
            flushing.cancel()

    async def clean(self, max_resting: int = _MAX_RESTING) -> None:
        """Delete the segments that are no longer needed, oldest first.

        Args:
            max_resting: so many of the newest are left alone for a while.
        """
        if self._journal is None or self._unknown_damage is not None:
            return
        sealed, now = self._journal.sealed(), time.monotonic()
        self._sealed_since = {segment: self._sealed_since.get(segment, now) for segment in sealed}
        for place, segment in enumerate(sealed):
            if len(sealed) - place <= max_resting and now - self._sealed_since[segment] < _REST_SECONDS:
                return
            waited_for = self._waited_for(segment)
            for run_id in waited_for:
                self._snapshots.hurry(run_id)
            if waited_for:
                return
            found = await asyncio.to_thread(self._journal.examine, segment)
            if found.is_damaged and segment not in self._damaged:
                self._unknown_damage = segment
                return
            for payload in found.payloads:
                self._keep_if_needed(records.decode(payload))
            await self._journal.answered()
            self._journal.delete(segment)
            self._latest.pop(segment, None)

    def _waited_for(self, segment: int) -> list[str]:
        """Runs that have changed by requests of this segment since they were copied."""
        return [
            run_id
            for run_id, last in self._latest.get(segment, {}).items()
            if run_id in self._runs
            and self._snapshots.stored(run_id) < min(last, self._snapshots.last_change(run_id))
        ]

    def note_earlier(self, segment: int, record: Record) -> None:
        """A record that an earlier process wrote."""
        if isinstance(record, Accepted) and record.run_id is not None:
            self._note(segment, record.run_id, record.seq_id)

    def _keep_if_needed(self, record: Record) -> None:
        """Write a record of an old segment once more if anybody may need it."""
        match record:
            case Begun(run) if run.run_id in self._runs:
                self._append(record)
            case Accepted(request_id=request_id):
                # Of a run without a copy its creation is all that there is.
                stored = self._snapshots.stored(record.run_id or "")
                is_on_disk = record.run_id is None or 0 < stored >= record.seq_id
                is_pending = self._futures.is_pending(request_id)
                if is_pending or not is_on_disk and record.run_id in self._runs:
                    self._rewrite(record)
                elif self._futures.is_known(request_id):  # of a sample it says which client's it was
                    self._rewrite(record if record.run_id is None else replace(record, body=None))
            case Rejected(run_id, seq_id):
                if run_id in self._runs and seq_id > self._snapshots.stored(run_id):
                    self._append(record)
            case Lost(run) if run.run_id in self._lost:
                self._append(record)
            case Done(outcomes):
                known = [outcome for outcome in outcomes if self._futures.is_known(outcome[0])]
                if known:
                    self._append(Done(known))
            case _:
                pass

    def _rewrite(self, record: Accepted) -> None:
        self._append(record)
        if self._journal is not None and record.run_id is not None:
            self._note(self._journal.segment, record.run_id, record.seq_id)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
