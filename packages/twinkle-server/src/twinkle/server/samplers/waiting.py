"""Who is admitted next: samples that wait for a place in the running batch, fair between tenants. No torch."""

from collections import deque
from collections.abc import Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from twinkle.server.samplers.deficits import DeficitRoundRobin

T = TypeVar("T", bound=Hashable)

# Tokens a tenant earns each round.
QUANTUM = 1024


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A request of which some samples have not been admitted yet.

    Attributes:
        tokens: what one sample may cost at most, prompt included.
        samples: how many are still to be admitted.
    """

    tenant: str
    item: T
    tokens: int
    samples: int


@dataclass
class WaitingLine(Generic[T]):
    """Each tenant's requests in order; between tenants by deficit round robin over tokens."""

    _turns: DeficitRoundRobin = field(default_factory=lambda: DeficitRoundRobin(QUANTUM))
    _lines: dict[str, deque[Waiting[T]]] = field(default_factory=dict[str, deque[Waiting[T]]])

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, waiting: Waiting[T]) -> None:
        self._lines.setdefault(waiting.tenant, deque()).append(waiting)
        self._turns.activate(waiting.tenant)

    def take(
        self, places: int, running_longest: int, running: int, max_tokens: int, at_most: int | None = None
    ) -> list[tuple[Waiting[T], int]]:
        """Requests to admit, and how many samples of each.

        The batch is a rectangle: rows times the longest sequence that any row may reach stays within `max_tokens`,
        but a batch that is empty takes its first whatever it costs.

        Args:
            places: rows that are free.
            running_longest: the longest that a running sequence may become, in tokens.
            running: rows that are taken.
            at_most: requests; None is as many as fit.
        """
        admitted: list[tuple[Waiting[T], int]] = []
        rows, longest = running, running_longest
        while places > 0 and self._lines and (at_most is None or len(admitted) < at_most):
            tenant = self._turns.first()
            head = self._lines[tenant][0]
            longest_then = max(longest, head.tokens)
            fitting = max(max_tokens // longest_then - rows, 1 if rows == 0 else 0)
            count = min(head.samples, places, fitting)
            if count == 0:
                break  # it goes first as soon as there is room: nobody overtakes it for ever
            if not self._turns.can_spend(tenant, count * head.tokens):
                self._turns.grant(tenant)
                continue
            self._turns.spend(tenant, count * head.tokens)
            self._admit(tenant, head, count)
            admitted.append((head, count))
            rows, longest, places = rows + count, longest_then, places - count
        return admitted

    def remove(self, items: AbstractSet[T]) -> None:
        """Forget requests, wherever they stand."""
        for tenant, line in list(self._lines.items()):
            self._lines[tenant] = deque(waiting for waiting in line if waiting.item not in items)
            if not self._lines[tenant]:
                del self._lines[tenant]
                self._turns.deactivate(tenant)

    def remove_all(self) -> list[Waiting[T]]:
        """Everything that waits; the line is empty then."""
        everything = [waiting for line in self._lines.values() for waiting in line]
        for tenant in list(self._lines):
            self._turns.deactivate(tenant)
        self._lines.clear()
        return everything

    def _admit(self, tenant: str, head: Waiting[T], count: int) -> None:
        head.samples -= count
        if head.samples == 0:
            line = self._lines[tenant]
            line.popleft()
            if not line:
                del self._lines[tenant]
                self._turns.deactivate(tenant)
