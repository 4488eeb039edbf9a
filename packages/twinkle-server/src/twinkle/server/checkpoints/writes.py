"""Checkpoints being written or deleted while the engine goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from twinkle.protocol.uris import CheckpointUri


@dataclass(frozen=True, eq=False)
class _Write:
    tenant: str
    task: asyncio.Task[None]


class Writes:
    """Single-threaded: called on one event loop. Work on one checkpoint never overlaps."""

    def __init__(self) -> None:
        self._last: dict[CheckpointUri, _Write] = {}  # the last for each checkpoint, after all earlier ones

    def begin(self, uri: CheckpointUri, tenant: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start `work`, which writes or deletes `uri`, a checkpoint of `tenant`, after any earlier work on it."""
        previous = self._last.get(uri)

        async def after_previous() -> None:
            if previous is not None:
                await asyncio.wait({previous.task})
            try:
                await work
            finally:
                last = self._last.get(uri)
                if last is not None and last.task is asyncio.current_task():
                    del self._last[uri]

        task = asyncio.create_task(after_previous())
        self._last[uri] = _Write(tenant, task)
        return task

    async def of(self, uri: CheckpointUri, tenant: str) -> None:
        """Wait for the tenant's current writes of the checkpoint meant by `uri`, which may be a bare name."""
        await _ended(
            {
                write.task
                for other, write in self._last.items()
                if write.tenant == tenant and other.name == uri.name and uri.run_id in (None, other.run_id)
            }
        )

    async def of_exactly(self, uri: CheckpointUri) -> bool:
        """Wait for current writes of a checkpoint, of any tenant; returns False if there are none."""
        write = self._last.get(uri)
        await _ended(set() if write is None else {write.task})
        return write is not None

    async def all(self) -> None:
        """Wait until nothing is being written."""
        while self._last:
            await _ended({write.task for write in self._last.values()})


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(tasks)
