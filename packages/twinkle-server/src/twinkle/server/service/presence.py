"""Which sessions have a client that is there: it asks for something, sends heartbeats, or waits for a result.

A client that was there and isn't heard of any more has ended, or can't be reached: nobody waits for its samples. One
that never asked for a result may come for it at any time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

# Between two looks no more than this counts: a server that stood still has heard of nobody.
_LONGEST_LOOK_SECONDS = 10.0
# A client that polls, without heartbeats, may be silent for so long at most, if it was before.
_LONGEST_PATIENCE_SECONDS = 900.0


@dataclass(eq=False)
class _Seen:
    """
    Attributes:
        last: when it was heard of last.
        is_watched: it has sent a heartbeat, or waited for a result.
        sends_heartbeats: it does so every few seconds, whatever else it does.
        longest: its longest silence so far after which it came back, in seconds.
    """

    last: float
    is_watched: bool = False
    sends_heartbeats: bool = False
    longest: float = 0.0


class Presence:
    """Single-threaded: called on one event loop."""

    def __init__(self, silence_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            silence_seconds: who is silent for so long is gone; None takes nobody for gone.
        """
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._looked_at = clock()
        self._now = 0.0  # of a clock of its own, which stands still while this process does
        self._seen: dict[str, _Seen] = {}
        self._waiting: Counter[str] = Counter()

    def heard_of(self, session_id: str, heartbeat: bool = False) -> None:
        """Its client has asked for something."""
        seen = self._seen.setdefault(session_id, _Seen(self._now))
        if session_id not in self._waiting:
            seen.longest = max(seen.longest, self._now - seen.last)
        seen.last = self._now
        seen.sends_heartbeats |= heartbeat
        seen.is_watched |= heartbeat

    def expect(self, session_id: str) -> None:
        """Its client was there before this process was, and will come back if it is still."""
        self.heard_of(session_id)
        self._seen[session_id].is_watched = True

    @contextmanager
    def waiting(self, session_id: str | None) -> Generator[None]:
        """Its client waits for a result while the block runs; None is of no session."""
        if session_id is None:
            yield
            return
        self.heard_of(session_id)
        self._seen[session_id].is_watched = True
        self._waiting[session_id] += 1
        try:
            yield
            if session_id in self._seen:  # it didn't hang up
                self.heard_of(session_id)
        finally:
            self._waiting[session_id] -= 1
            if not self._waiting[session_id]:
                del self._waiting[session_id]

    def forget(self, session_id: str) -> None:
        self._seen.pop(session_id, None)

    def look(self) -> None:
        """Time has gone on."""
        now = self._clock()
        self._now += min(now - self._looked_at, _LONGEST_LOOK_SECONDS)
        self._looked_at = now

    def silent_for(self, session_id: str) -> float:
        """Seconds since the client was heard of, as of the last look; 0 while it waits for a result."""
        seen = self._seen.get(session_id)
        return 0.0 if seen is None or session_id in self._waiting else self._now - seen.last

    def is_gone(self, session_id: str) -> bool:
        seen = self._seen.get(session_id)
        if seen is None or not seen.is_watched or self._silence_seconds is None:
            return False
        patience = self._silence_seconds
        if not seen.sends_heartbeats:  # it was away for longer before, and came back
            patience = max(patience, min(2 * seen.longest, _LONGEST_PATIENCE_SECONDS))
        return self.silent_for(session_id) >= patience
