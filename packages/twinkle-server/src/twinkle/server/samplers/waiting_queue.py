"""Samples that wait for slots in the running batch, fair between tenants. No torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from twinkle.server.samplers.cache_usage import CacheUsage
from twinkle.server.scheduling.fair_queue import FairQueue

T = TypeVar("T", bound=Hashable)

# Tokens a tenant earns each round: so far may a tenant with small samples get ahead of one with large ones.
QUANTUM = 1024


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A request with samples that have not been admitted, or a sample that was preempted.

    Attributes:
        tokens: what one sample may cost at most, prompt included; its tenant is charged for it. 0 if it has been.
        length: tokens of KV cache that one sample takes to begin with.
        samples: how many are still to be admitted.
    """

    tenant: str
    item: T
    tokens: int
    length: int
    samples: int


@dataclass
class WaitingQueue(Generic[T]):
    """Each tenant's requests in order; between tenants a fair queue over tokens."""

    _turns: FairQueue = field(default_factory=FairQueue)
    _queues: dict[str, deque[Waiting[T]]] = field(default_factory=dict[str, deque[Waiting[T]]])

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, waiting: Waiting[T]) -> None:
        self._queues.setdefault(waiting.tenant, deque()).append(waiting)
        self._turns.activate(waiting.tenant)

    def put_back(self, waiting: Waiting[T]) -> None:
        """It had been admitted, and precedes everything else of its tenant."""
        self._queues.setdefault(waiting.tenant, deque()).appendleft(waiting)
        self._turns.activate(waiting.tenant)

    def tenants(self) -> list[str]:
        """Tenants with something waiting, in turn."""
        return self._turns.in_turn()

    def wants(self, tenant: str) -> tuple[int, int]:
        """What its first sample takes to begin with, and how many samples wait in all."""
        queue = self._queues[tenant]
        return queue[0].length, sum(waiting.samples for waiting in queue)

    def take(self, usage: CacheUsage) -> list[tuple[Waiting[T], int]]:
        """Requests to admit, and how many samples of each; the usage grows by them.

        Where a tenant's first request does not fit, others may go before it: room is made for a tenant that has
        nothing running, so it does not wait for ever.
        """
        admitted: Counter[Waiting[T]] = Counter()
        passed_over = set[str]()
        while candidates := [tenant for tenant in self._turns.in_turn() if tenant not in passed_over]:
            tenant = next((tenant for tenant in candidates if self._affordable(tenant)), None)
            if tenant is None:
                # No round where none of them fits: it would only pay their debts.
                passed_over.update(tenant for tenant in candidates if not self._fitting(tenant, 1, usage))
                if candidates := [tenant for tenant in candidates if tenant not in passed_over]:
                    self._turns.earn(QUANTUM, candidates)
            elif count := self._fitting(tenant, self._affordable(tenant), usage):
                head = self._queues[tenant][0]
                self._admit(head, count, usage)
                admitted[head] += count
            else:
                passed_over.add(tenant)
        return list(admitted.items())

    def take_from(self, tenant: str, most: int, usage: CacheUsage) -> list[tuple[Waiting[T], int]]:
        """As `take`, but of one tenant, for which room was made: at most so many samples, whatever it owes."""
        admitted: list[tuple[Waiting[T], int]] = []
        while most > 0 and tenant in self._queues:
            head = self._queues[tenant][0]
            count = usage.fitting(head.length, min(head.samples, most), may_fill=True)
            if count == 0:
                break
            self._admit(head, count, usage)
            admitted.append((head, count))
            most -= count
        return admitted

    def remove(self, is_meant: Callable[[T], bool]) -> None:
        """Forget requests, wherever they stand."""
        for tenant, queue in list(self._queues.items()):
            self._queues[tenant] = deque(waiting for waiting in queue if not is_meant(waiting.item))
            self._forget_if_empty(tenant)

    def items(self) -> list[T]:
        """Everything that waits."""
        return [waiting.item for queue in self._queues.values() for waiting in queue]

    def _affordable(self, tenant: str) -> int:
        """How many samples of its first request a tenant may have before others' turns."""
        head = self._queues[tenant][0]
        if not head.tokens:
            return head.samples
        # The one that exhausts the balance included: so samples of two tenants alternate, however many each asks for.
        return max(0, min(head.samples, -(-self._turns.balance(tenant) // head.tokens)))

    def _fitting(self, tenant: str, most: int, usage: CacheUsage) -> int:
        return usage.fitting(self._queues[tenant][0].length, most, may_fill=False)

    def _admit(self, head: Waiting[T], count: int, usage: CacheUsage) -> None:
        usage.add(head.length, count)
        self._turns.charge(head.tenant, count * head.tokens)
        head.samples -= count
        if head.samples == 0:
            self._queues[head.tenant].popleft()
            self._forget_if_empty(head.tenant)

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant]
            self._turns.deactivate(tenant)
