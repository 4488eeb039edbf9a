"""Threads for one purpose each, so that filling them blocks nothing else; a tenant may use only a few at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from twinkle.protocol.errors import LimitReached

T = TypeVar("T")

_ROOM_SECONDS = 1.0


@dataclass(eq=False)
class _Tenant:
    free: asyncio.Semaphore
    pieces: int = 0  # waiting or running work


class TenantThreads:
    """A tenant's work waits for its own, and for at most one piece of each other's. Called on one event loop."""

    def __init__(self, purpose: str, threads: int, per_tenant: int, most_waiting: int = 256) -> None:
        """
        Args:
            purpose: named in the threads' names, and in the error for too much work.
            per_tenant: how many threads a tenant may use at once.
            most_waiting: most pieces of work of one tenant.
        """
        self._purpose = purpose
        self._per_tenant = per_tenant
        self._most_waiting = most_waiting
        self._executor = ThreadPoolExecutor(threads, f"twinkle-{purpose}")
        self._tenants: dict[str, _Tenant] = {}

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Run blocking `work` in a thread.

        Raises:
            LimitReached: if too much of the tenant's work is waiting already.
        """
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = _Tenant(asyncio.Semaphore(self._per_tenant))
        if own.pieces >= self._most_waiting:
            raise LimitReached(
                f"{self._purpose}: {own.pieces} requests of this tenant are being worked on; try again when some of "
                "them are done",
                _ROOM_SECONDS,
            )
        own.pieces += 1
        try:
            await own.free.acquire()
        except BaseException:
            self._ended(tenant, own)
            raise
        doing = asyncio.get_running_loop().run_in_executor(self._executor, work)

        def done(_future: asyncio.Future[T]) -> None:
            own.free.release()
            self._ended(tenant, own)

        doing.add_done_callback(done)
        return await asyncio.shield(doing)  # the thread goes on even if nobody waits any more

    def _ended(self, tenant: str, own: _Tenant) -> None:
        own.pieces -= 1
        if own.pieces == 0:
            del self._tenants[tenant]

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class Threads:
    """A service's threads for what tenants may ask at any time.

    Attributes:
        queries: of the database.
        downloads: of files.
    """

    def __init__(self) -> None:
        self.queries = TenantThreads("queries", threads=4, per_tenant=2)
        self.downloads = TenantThreads("downloads", threads=4, per_tenant=2)

    def close(self) -> None:
        self.queries.close()
        self.downloads.close()
