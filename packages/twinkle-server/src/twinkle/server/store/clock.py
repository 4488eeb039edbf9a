"""The wall clock, for decisions that can't be undone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("twinkle.server")

# Far above slewing and the time between two readings.
_LEAP_SECONDS = 60.0
# How long a time server (asked at least every 17 minutes) or a person has to correct a wrong clock.
STEADY_SECONDS = 3600.0


class SteadyClock:
    """Wall time that is trusted once it has run evenly with the monotonic clock for an hour.

    When a clock leaps, there is no way to know which of the two times is right, nor whether the time is right just
    after a machine has started. So for an hour after either there is no time to go by.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._steady_since = monotonic()
        self._leapt_at: float | None = None  # by the monotonic clock
        self._ahead = wall() - self._steady_since  # of the monotonic clock, at the last reading

    def now(self) -> float | None:
        """Seconds since 1970; None while that can't be trusted. A leap is noticed at the next call."""
        wall, monotonic = self._wall(), self._monotonic()
        leap = wall - monotonic - self._ahead
        self._ahead += leap
        if abs(leap) > _LEAP_SECONDS:
            self._steady_since = self._leapt_at = monotonic
            log.warning(
                "the machine's clock has leapt %s by %.0f s (or the machine has slept): what has expired is deleted "
                "only when the clock has been steady for %.0f minutes; set it right before that if it is wrong",
                "forward" if leap > 0 else "back",
                abs(leap),
                STEADY_SECONDS / 60,
            )
        return wall if monotonic - self._steady_since >= STEADY_SECONDS else None

    def has_leapt(self) -> bool:
        """Whether the clock has leapt within the last hour."""
        self.now()
        return self._leapt_at is not None and self._monotonic() - self._leapt_at < STEADY_SECONDS
