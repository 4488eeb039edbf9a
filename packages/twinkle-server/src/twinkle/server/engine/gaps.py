"""The gaps between an engine's calls, in which others may change what it is to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager


class Gaps:
    """Single-threaded: on the engine's event loop."""

    def __init__(self) -> None:
        self._calling = asyncio.Lock()
        self._wanted = 0

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a gap, or is in one: nothing may be dispatched ahead."""
        return self._wanted > 0

    @asynccontextmanager
    async def call(self) -> AsyncGenerator[None]:
        """While entered a call is computed; no gap begins."""
        async with self._calling:
            yield

    @asynccontextmanager
    async def gap(self, is_idle: Callable[[], bool]) -> AsyncGenerator[None]:
        """While entered no call is begun.

        Args:
            is_idle: whether nothing was dispatched ahead; it is asked between two calls.
        """
        self._wanted += 1
        try:
            await self._calling.acquire()
            while not is_idle():
                self._calling.release()
                await asyncio.sleep(0)
                await self._calling.acquire()
            try:
                yield
            finally:
                self._calling.release()
        finally:
            self._wanted -= 1
