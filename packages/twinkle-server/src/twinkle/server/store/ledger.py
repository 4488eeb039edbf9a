"""Usage, counted in memory and written in the background: a request never waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Literal, NamedTuple

from twinkle.server.store.database import Database
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import Usage

log = logging.getLogger("twinkle.server")

UsageKind = Literal["training", "sampling_prefill", "sampling_sample", "checkpoint"]

_FLUSH_SECONDS = 5.0


class _Key(NamedTuple):
    tenant: str
    hour: int
    session_id: str
    kind: UsageKind


class Ledger:
    """Counts tokens and checkpoints by hour, session and kind, and when each run last got a request.

    Single-threaded: called on one event loop. Up to a few seconds of it are lost if the process is killed.
    """

    def __init__(self, database: Database, base_model: str) -> None:
        self._database = database
        self._base_model = base_model
        self._counts: Counter[_Key] = Counter()
        self._run_times: dict[str, float] = {}
        self._writing = asyncio.Lock()
        self.used: Counter[tuple[str, UsageKind]] = Counter()
        """By tenant and kind, since this process began."""

    def record(self, tenant: str, session_id: str, kind: UsageKind, count: int) -> None:
        """Add usage: tokens, or the number of checkpoints."""
        if count:
            self._counts[_Key(tenant, int(time.time() // 3600), session_id, kind)] += count
            self.used[tenant, kind] += count

    def touch(self, run_id: str) -> None:
        """A run got a request."""
        self._run_times[run_id] = time.time()

    async def run(self) -> None:
        """Write every few seconds, forever, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            try:
                await self.flush()
            except DatabaseGone:
                pass  # the database has logged it once
            except Exception:  # retried soon
                log.exception("what was used could not be written; it is kept and tried again")

    async def flush(self) -> None:
        """Write what has not been written yet."""
        async with self._writing:
            counts, self._counts = self._counts, Counter()
            run_times, self._run_times = self._run_times, {}
            if not counts and not run_times:
                return
            rows = [Usage(**key._asdict(), base_model=self._base_model, count=n) for key, n in counts.items()]
            try:
                await asyncio.to_thread(self._database.write_ledger, rows, run_times)
            except BaseException:
                self._counts.update(counts)
                self._run_times = {**run_times, **self._run_times}
                raise
