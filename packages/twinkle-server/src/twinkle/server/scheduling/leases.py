"""Each session's lease, renewed by requests, heartbeats, and waiting for a result.

A client whose lease has expired has ended or can't be reached, and its samples are paused. This doesn't apply to a
client that never asked for a result: it may do so at any time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass

# At most this much counts between two ticks: a server that was stopped has heard from nobody.
_LONGEST_TICK_SECONDS = 10.0
# The longest silence granted to a client that polls without heartbeats and has been silent before.
_MAX_SILENCE_SECONDS = 900.0


@dataclass(eq=False)
class Lease:
    """
    Attributes:
        renewed_at: by the monotonic clock.
        heard_at: the same, by the clock that stops while this process is stopped.
        is_watched: the client has sent a heartbeat or waited for a result.
        sends_heartbeats: the client sends one every few seconds, whatever else it does.
        longest: its longest silence so far after which it came back, in seconds.
    """

    renewed_at: float
    heard_at: float
    is_watched: bool = False
    sends_heartbeats: bool = False
    longest: float = 0.0


class Leases:
    """Single-threaded: called on one event loop."""

    def __init__(self, silence_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            silence_seconds: a client silent for longer counts as gone; None: never.
            clock: monotonic, so that setting the wall clock doesn't end leases.
        """
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._ticked_at = clock()
        self._now = 0.0  # by the clock that stops while this process is stopped
        self._leases: dict[str, Lease] = {}
        self._waiting: Counter[str] = Counter()

    def get(self, session_id: str) -> Lease | None:
        return self._leases.get(session_id)

    def sessions(self) -> set[str]:
        """All sessions with a lease."""
        return set(self._leases)

    def add(self, session_id: str) -> Lease:
        """The session's lease, created unwatched if it has none."""
        lease = self._leases.get(session_id)
        if lease is None:
            lease = self._leases[session_id] = Lease(self._clock(), self._now)
        return lease

    def renew(self, session_id: str, heartbeat: bool = False) -> Lease:
        """The session's client has sent a request or a heartbeat."""
        lease = self.add(session_id)
        if session_id not in self._waiting:
            lease.longest = max(lease.longest, self._now - lease.heard_at)
        lease.renewed_at, lease.heard_at = self._clock(), self._now
        lease.sends_heartbeats |= heartbeat
        lease.is_watched |= heartbeat
        return lease

    def expect(self, session_id: str) -> None:
        """The session's client was there before a restart, and is expected back."""
        self.renew(session_id).is_watched = True

    @contextmanager
    def waiting(self, sessions: Collection[str]) -> Generator[None]:
        """The client waits for results of these sessions while the block runs. Those without a lease are over."""
        sessions = [session_id for session_id in sessions if session_id in self._leases]
        for session_id in sessions:
            self.renew(session_id).is_watched = True
        self._waiting.update(sessions)
        try:
            yield
            for session_id in sessions:  # the client didn't hang up
                if session_id in self._leases:
                    self.renew(session_id)
        finally:
            for session_id in sessions:
                self._waiting[session_id] -= 1
                if not self._waiting[session_id]:
                    del self._waiting[session_id]

    def forget(self, session_id: str) -> None:
        self._leases.pop(session_id, None)

    # ------------------------------------------------------------ silent clients

    def tick(self) -> None:
        """Advance the clock that silence is measured by."""
        now = self._clock()
        self._now += min(now - self._ticked_at, _LONGEST_TICK_SECONDS)
        self._ticked_at = now

    def silent_for(self, session_id: str) -> float:
        """Seconds since the client was last heard from, as of the last tick; 0 while it waits for a result."""
        lease = self._leases.get(session_id)
        return 0.0 if lease is None or session_id in self._waiting else self._now - lease.heard_at

    def is_gone(self, session_id: str) -> bool:
        lease = self._leases.get(session_id)
        if lease is None or not lease.is_watched or self._silence_seconds is None:
            return False
        allowed = self._silence_seconds
        if not lease.sends_heartbeats:  # it was away for longer before, and came back
            allowed = max(allowed, min(2 * lease.longest, _MAX_SILENCE_SECONDS))
        return self.silent_for(session_id) >= allowed

    def active(self, seconds: float) -> set[str]:
        """Sessions whose lease was renewed in the last `seconds`."""
        since = self._clock() - seconds
        return {session_id for session_id, lease in self._leases.items() if lease.renewed_at > since}
