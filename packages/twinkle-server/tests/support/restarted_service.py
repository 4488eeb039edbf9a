"""A service that ends, in whatever way, and another one on the same storage.

An end without a word is a service whose tasks are cancelled and whose worker is never asked again; its journal is let
go of as the operating system does for a killed process.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from fake_service import Tenant
from mortal_worker import MortalWorker, make_mortal_service

from twinkle.server.service.service import Service
from twinkle.server.store.journal import Journal

AT_ONCE, HARDLY_EVER = 0.0, 3600.0


class Server:
    """One service after the other on a storage."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
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

    async def start(self) -> Tenant:
        self.worker = MortalWorker()

        def journal() -> Journal:
            self._journal = Journal(self.directory / "journal", segment_bytes=self.segment_bytes)
            return self._journal

        self._service = make_mortal_service(
            self.directory, self.worker, self.seconds, self.adapter_bytes, journal
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
