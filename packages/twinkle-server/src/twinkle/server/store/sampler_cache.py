"""Sampling sessions in use, so that a sample needs no query."""

from __future__ import annotations

import asyncio

from twinkle.protocol.errors import NotFound
from twinkle.server.store.database import Database
from twinkle.server.store.tables import SamplingSession


class SamplerCache:
    """Rows of sampling sessions; the fields used never change. Single-threaded: called on one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows: dict[str, SamplingSession] = {}

    async def find(self, tenant: str, sampler_id: str) -> SamplingSession:
        """
        Raises:
            NotFound: if the tenant has no such sampling session.
        """
        sampler = self._rows.get(sampler_id)
        if sampler is None or sampler.tenant != tenant:
            sampler = await asyncio.to_thread(self._database.sampler, tenant, sampler_id)
            if sampler is None:
                raise NotFound(
                    f"sampling_session_id: no sampling session {sampler_id[:200]!r}; make one with "
                    "create_sampling_client"
                )
            self._rows[sampler.id] = sampler
        return sampler

    def forget(self, session_id: str) -> list[str]:
        """Drop the rows of a session that is over; returns their ids."""
        ids = [sampler.id for sampler in self._rows.values() if sampler.session_id == session_id]
        for sampler_id in ids:
            del self._rows[sampler_id]
        return ids
