"""Which sample vLLM is given next. No vLLM, no torch.

vLLM's own queue is first come, first served, so no more is given to it than it runs at once. What waits, waits here,
fairly between tenants (`samplers.waiting_queue`). What counts is

    sequences   so many as vLLM runs at once; a share of them is kept for tenants that have none running, so that
                nobody waits for the end of another's long samples
    adapters    so many different ones as vLLM computes with at once. If the next sample needs one more, nothing is
                given to vLLM before one has ended: otherwise those whose adapters run would keep it out for ever
    tokens      prompts that its KV cache has room for. (As they grow, vLLM preempts on its own if it must.)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from twinkle.server.samplers.cache_usage import CacheUsage, Limits
from twinkle.server.samplers.waiting_queue import Waiting, WaitingQueue

# This share of the sequences, as a divisor, is for tenants that have none running.
_FOR_NEWCOMERS = 5


class Admissible(Protocol):
    """A request, as far as it matters here."""

    @property
    def tenant(self) -> str: ...

    @property
    def adapter_number(self) -> int | None:
        """None: the base model."""
        ...

    @property
    def prompt_length(self) -> int: ...

    @property
    def longest(self) -> int:
        """Most tokens of a sample, prompt included."""
        ...


T = TypeVar("T", bound=Admissible)


@dataclass
class Admission(Generic[T]):
    """
    Attributes:
        sequences: most that vLLM runs at once.
        adapters: most different ones among them.
        tokens: of its KV cache.
    """

    sequences: int
    adapters: int
    tokens: int
    _waiting: WaitingQueue[T] = field(default_factory=WaitingQueue[T])
    _running: Counter[T] = field(default_factory=Counter[T])
    _next: T | None = None  # taken out of the queue; waits for its adapter's turn

    def add(self, item: T, samples: int) -> None:
        self._waiting.add(Waiting(item.tenant, item, item.longest, item.prompt_length, samples))

    def next(self) -> T | None:
        """The request of which vLLM is to be given one more sample; None if it must wait. It counts as running."""
        if self._next is None:
            self._next = self._take()
        if self._next is None or not self._has_place(self._next.adapter_number):
            return None
        item, self._next = self._next, None
        self._running[item] += 1
        return item

    def ended(self, item: T) -> None:
        """One of its samples runs no more."""
        self._running[item] -= 1
        if not self._running[item]:
            del self._running[item]

    def forget(self, item: T) -> None:
        """None of its samples that wait is to be drawn."""
        self._waiting.remove(lambda other: other is item)
        if self._next is item:
            self._next = None

    def _take(self) -> T | None:
        if not self._waiting or (running := self._running.total()) >= self.sequences:
            return None
        shared = self.sequences - self.sequences // _FOR_NEWCOMERS
        if running < shared and (taken := self._waiting.take(self._usage_for_one())):
            return taken[0][0].item
        has_some = {item.tenant for item in self._running}
        for tenant in self._waiting.tenants():
            if tenant not in has_some and (
                taken := self._waiting.take_from(tenant, 1, self._usage_for_one())
            ):
                return taken[0][0].item
        return None

    def _usage_for_one(self) -> CacheUsage:
        """What runs, with room for one more sequence."""
        limits = Limits(self.sequences, self.tokens, per_sequence=True)
        usage = CacheUsage(limits)
        for item, samples in self._running.items():
            usage.add(item.prompt_length, samples)
        usage.limits = replace(limits, rows=usage.rows + 1)
        return usage

    def _has_place(self, adapter: int | None) -> bool:
        active = {item.adapter_number for item in self._running} - {None}
        return adapter is None or adapter in active or len(active) < self.adapters
