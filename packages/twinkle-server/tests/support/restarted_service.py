"""A service that ends, in whatever way, and another one on the same storage.

An end without a word is a service whose tasks are cancelled and whose worker is never asked again; its journal is let
go of as the operating system does for a killed process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from fake_service import Tenant
from mortal_worker import MortalWorker, make_mortal_service

from twinkle.protocol.errors import Unavailable
from twinkle.server.scheduling import records
from twinkle.server.service.service import Service
from twinkle.server.store.journal import Journal

AT_ONCE, HARDLY_EVER = 0.0, 3600.0


def stored(tenant: Tenant, run_id: str) -> int:
    """The newest request of a live run that a snapshot on disk has; 0 if there is none."""
    return tenant.service.parts.live.find(tenant.name, run_id).snapshot.stored or 0


class Server:
    """One service after the other on a storage."""

    def __init__(self, directory: Path, database_url: str | None = None, engine: str | None = None) -> None:
        """
        Args:
            database_url: of several engines; default: of a database of its own.
            engine: its name among several.
        """
        self.directory = directory
        self.database_url, self.engine = database_url, engine
        self.seconds = HARDLY_EVER
        self.segment_bytes = 2**20
        self.worker = MortalWorker()
        self.adapter_bytes: int | None = None
        self._journal: Journal | None = None
        self._service: Service | None = None

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    @property
    def journal(self) -> Journal:
        assert self._journal is not None
        return self._journal

    @contextmanager
    def no_room_for_outcomes(self) -> Generator[None]:
        """The disk is full whenever an outcome is to be written, and only then."""

        def append(payload: bytes) -> int:
            if isinstance(records.decode(payload), records.Done):
                raise Unavailable("the disk is full")
            return Journal.append(self.journal, payload)

        with patch.object(self.journal, "append", append):
            yield

    async def start(self) -> Tenant:
        self.worker = MortalWorker()

        def journal() -> Journal:
            self._journal = Journal(self.directory / "journal", segment_bytes=self.segment_bytes)
            return self._journal

        self._service = make_mortal_service(
            self.directory,
            self.worker,
            self.seconds,
            self.adapter_bytes,
            journal,
            self.database_url,
            self.engine,
        )
        await self._service.start()
        return Tenant(self._service, "alice")

    def kill(self) -> None:
        """Whatever is under way stops where it is."""
        journal = self._journal
        assert journal is not None
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        self.worker.kills = lambda *_: True
        os.close(journal._lock)
        journal._descriptor, journal._directory = -1, self.directory / "no longer there"
        self._service = None

    async def kill_and_start(self) -> Tenant:
        self.kill()
        await asyncio.sleep(0)
        return await self.start()

    async def close(self) -> None:
        if self._service is not None:
            await self._service.close()
            self._service = None
