"""What the engine has done since it started: plain numbers that only grow, since a tick must not pay for them."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from twinkle.server.backends.protocol import BaseModelInfo
from twinkle.server.engine.calls import Call
from twinkle.server.engine.packing import Packed

# Upper bounds, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Histogram:
    """
    Attributes:
        counts: by the first of `BOUNDS` that is not below the value; one more for those above all.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


class Tally:
    """
    Attributes:
        seconds: that the engine waited for calls, by kind. (One that was dispatched ahead has begun before.)
        jobs: that were computed, by kind.
        tokens: of training passes.
        padding: computed beside them, so that rows of a micro-batch are of one length.
        failures: calls that failed, in whole or in part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, Histogram] = {}
        self.jobs: Counter[str] = Counter()
        self.tokens = 0
        self.padding = 0
        self.failures = 0

    @contextmanager
    def timed(self, call: Call) -> Generator[None]:
        """While it is computed."""
        began = time.perf_counter()
        try:
            yield
        except Exception:
            self.failures += 1
            raise
        self.seconds.setdefault(_kind(call), Histogram()).add(time.perf_counter() - began)
        self.jobs.update(type(job.request).__name__.removesuffix("Request") for job in call.jobs)

    def packed(self, packed: Packed, info: BaseModelInfo) -> Packed:
        """Count its tokens; returns it."""
        tokens = sum(len(row.tokens) for rows in packed.micro_batches for row in rows)
        self.tokens += tokens
        self.padding += packed.cost(replace(info, overhead_tokens=0)) - tokens
        return packed


def _kind(call: Call) -> str:
    if call.other is not None:
        return "other"
    return "+".join(name for name, jobs in (("pass", call.passes), ("step", call.optim_steps)) if jobs)
