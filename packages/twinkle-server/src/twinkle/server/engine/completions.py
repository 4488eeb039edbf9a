"""Which samples have ended, in order, for clients that ask about all of theirs at once."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from twinkle.protocol.messages import Completion, RetrieveFuturesResponse

Target: TypeAlias = tuple[str, int]
"""A client: (sampling session, the client's number in it)."""

# The SDK has at most 2000 samples under way; a client that never asks must not fill the memory.
MAX_KEPT = 8192


@dataclass(eq=False)
class _Log:
    ended: deque[tuple[int, Completion]] = field(default_factory=lambda: deque(maxlen=MAX_KEPT))
    last: int = 0
    waiting: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class CompletionLog:
    """Completions by client. Single-threaded: called on one event loop."""

    def __init__(self) -> None:
        self._logs: dict[Target, _Log] = {}

    def add(self, target: Target, completion: Completion) -> None:
        """A sample has ended."""
        log = self._logs.setdefault(target, _Log())
        log.last += 1
        log.ended.append((log.last, completion))
        log.changed.set()

    async def after(self, target: Target, cursor: int, timeout: float) -> RetrieveFuturesResponse:
        """What ended after `cursor`, as soon as there is anything; empty after `timeout` seconds.

        Everything up to `cursor` has been seen, and is forgotten.
        """
        log = self._logs.setdefault(target, _Log())
        try:
            return await self._after(log, cursor, timeout)
        finally:
            if not log.last and self._logs.get(target) is log and not log.waiting:
                del self._logs[target]  # nothing is kept for an unknown client

    async def _after(self, log: _Log, cursor: int, timeout: float) -> RetrieveFuturesResponse:
        if cursor > log.last:  # from an earlier engine
            cursor = 0
        while log.ended and log.ended[0][0] <= cursor:
            log.ended.popleft()
        if not log.ended and timeout > 0:
            log.changed.clear()
            log.waiting += 1
            try:
                await asyncio.wait_for(log.changed.wait(), timeout)
            except TimeoutError:
                return RetrieveFuturesResponse(completions=[], cursor=cursor)
            finally:
                log.waiting -= 1
        fresh = [completion for number, completion in log.ended if number > cursor]
        return RetrieveFuturesResponse(completions=fresh, cursor=log.last if fresh else cursor)

    def forget(self, sampling_session_id: str) -> None:
        """The sampling session is over."""
        for target in [target for target in self._logs if target[0] == sampling_session_id]:
            del self._logs[target]
