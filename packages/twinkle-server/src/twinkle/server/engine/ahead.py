"""The next tick is sent while the model's process computes this one, so that it need not wait for it in between.

It is sent late: whoever comes after that waits for one tick more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from twinkle.server.engine.packing import Packed
from twinkle.server.engine.worker import Trained
from twinkle.server.scheduling.jobs import Tick

# The share of a tick after which the next one may be sent.
LATE = 0.8
# What the latest tick counts for in the mean.
_WEIGHT = 0.3


@dataclass(frozen=True, eq=False)
class Begun:
    """A tick whose passes and steps have been sent.

    Attributes:
        sent_at: the event loop's time, in seconds.
        cost: of its passes, in tokens.
    """

    tick: Tick
    packed: Packed
    call: asyncio.Task[Trained]
    sent_at: float
    cost: int


class Pace:
    """Seconds a token, an exponential mean over ticks."""

    def __init__(self) -> None:
        self._seconds_a_token: float | None = None
        self._free_at = 0.0  # when the last tick ended

    def ended(self, begun: Begun, now: float) -> None:
        """It has been computed; since it was sent, or since the tick before it had ended."""
        seconds_a_token = (now - max(begun.sent_at, self._free_at)) / max(1, begun.cost)
        self._free_at = now
        if self._seconds_a_token is not None:
            seconds_a_token = _WEIGHT * seconds_a_token + (1 - _WEIGHT) * self._seconds_a_token
        self._seconds_a_token = seconds_a_token

    def late_at(self, begun: Begun) -> float | None:
        """When most of it will have been computed, in the event loop's time; None if nothing is known yet."""
        if self._seconds_a_token is None:
            return None
        return max(begun.sent_at, self._free_at) + LATE * begun.cost * self._seconds_a_token
