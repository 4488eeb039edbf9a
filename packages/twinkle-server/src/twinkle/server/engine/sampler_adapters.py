"""Which adapters are resident in the sampler: loaded when they are used, least recently used ones evicted."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.worker import WorkerLost, WorkerPort


@dataclass(eq=False)
class _Resident:
    users: int = 0
    loaded: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SamplerAdapters:
    """A cache in front of the sampler. Single-threaded: called on one event loop.

    Adapters in use are never evicted, so there may be more than `capacity` for a moment.
    """

    def __init__(self, worker: WorkerPort, capacity: int) -> None:
        self._worker = worker
        self._capacity = capacity
        self._adapters: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first

    @asynccontextmanager
    async def use(self, key: str, read: Callable[[], Awaitable[AdapterState]]) -> AsyncGenerator[str]:
        """The adapter `key`, resident while the block runs; `read` fetches it if it isn't yet."""
        adapter = self._pin(key)
        try:
            async with adapter.lock:
                if not adapter.loaded:
                    await self._worker.add_sampler_adapter(key, await read())
                    adapter.loaded = True
            yield key
        finally:
            await self._unpin(key, adapter)

    async def publish(self, run_id: str, key: str, state: AdapterState) -> None:
        """Hand over a run's adapter, whose export is `state`, in memory. It stays until `release`, and after that while
        there is room.
        """
        adapter = self._pin(key)
        try:
            async with adapter.lock:
                await self._worker.publish(run_id, key, state)
                adapter.loaded = True
        except BaseException:
            await self._unpin(key, adapter)
            raise

    async def release(self, key: str) -> None:
        """The published adapter can be read from elsewhere now: it may be evicted."""
        await self._unpin(key, self._adapters[key])

    def worker_restarted(self) -> None:
        """Samplers beside training were restarted without adapters: each is read when it is next used."""
        if self._worker.samplers != "beside training":
            return
        for key, adapter in list(self._adapters.items()):
            adapter.loaded = False
            self._forget_if_gone(key, adapter)

    def _pin(self, key: str) -> _Resident:
        adapter = self._adapters.setdefault(key, _Resident())
        self._adapters.move_to_end(key)
        adapter.users += 1
        return adapter

    async def _unpin(self, key: str, adapter: _Resident) -> None:
        adapter.users -= 1
        self._forget_if_gone(key, adapter)
        surplus = len(self._adapters) - self._capacity
        for old, candidate in list(self._adapters.items())[: max(0, surplus)]:
            await self._evict(old, candidate)

    async def _evict(self, key: str, adapter: _Resident) -> None:
        async with adapter.lock:  # a user that arrives meanwhile waits, then loads it again
            if adapter.users == 0 and adapter.loaded:
                adapter.loaded = False
                with contextlib.suppress(WorkerLost):  # then it has gone with the sampler
                    await self._worker.remove_sampler_adapter(key)
        self._forget_if_gone(key, adapter)

    def _forget_if_gone(self, key: str, adapter: _Resident) -> None:
        if adapter.users == 0 and not adapter.loaded and self._adapters.get(key) is adapter:
            del self._adapters[key]
