"""The wall clock, for what can't be taken back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("twinkle.server")

# Slewing, and the time between two readings, are far below it.
_LEAP_SECONDS = 60.0
# A time server, which is asked every 17 minutes at the most, or a person has so long to set a wrong clock right.
STEADY_SECONDS = 3600.0


class SteadyClock:
    """Wall time that is believed once it has gone as evenly as time itself for an hour.

    Which of two times is right can't be known when a clock leaps, nor whether it is right when a machine has just been
    started. So for an hour after either there is no time to go by.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._steady_since = monotonic()
        self._leapt_at: float | None = None  # of the monotonic clock
        self._ahead = wall() - self._steady_since  # of the monotonic clock, at the last look

    def now(self) -> float | None:
        """Seconds since 1970; None while that can't be relied on. A leap is noticed when this is called next."""
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
        """Whether it has within the last hour."""
        self.now()
        return self._leapt_at is not None and self._monotonic() - self._leapt_at < STEADY_SECONDS
