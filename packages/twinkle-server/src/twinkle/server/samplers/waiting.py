"""Who is admitted next: samples that wait for a place in the running batch, fair between tenants. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from twinkle.server.samplers.deficits import DeficitRoundRobin
from twinkle.server.samplers.load import Load

T = TypeVar("T", bound=Hashable)

# Tokens a tenant earns each round.
QUANTUM = 1024


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A request of which some samples have not been admitted yet, or a sample that was paused.

    Attributes:
        tokens: what one sample may cost at most, prompt included: what its tenant spends. 0 if that has been spent.
        length: what one sample takes of the memory when it begins.
        samples: how many are still to be admitted.
    """

    tenant: str
    item: T
    tokens: int
    length: int
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

    def put_back(self, waiting: Waiting[T]) -> None:
        """It had been admitted, and comes before everything else of its tenant."""
        self._lines.setdefault(waiting.tenant, deque()).appendleft(waiting)
        self._turns.activate(waiting.tenant)

    def tenants(self) -> list[str]:
        """Who has something waiting, in turn."""
        return self._turns.in_turn()

    def wants(self, tenant: str) -> tuple[int, int]:
        """What its first sample takes to begin with, and how many samples wait in all."""
        line = self._lines[tenant]
        return line[0].length, sum(waiting.samples for waiting in line)

    def take(
        self, load: Load, most: int | None = None, only: str | None = None, may_fill: bool = False
    ) -> list[tuple[Waiting[T], int]]:
        """Requests to admit, and how many samples of each; the load grows by them.

        Where a tenant's first request finds no room, others may go before it: room is made for a tenant of whom nothing
        runs, so it does not wait for ever.

        Args:
            most: rows at most; None is as many as fit.
            only: of this tenant; None is of all.
            may_fill: see `Load.fitting`.
        """
        admitted: list[tuple[Waiting[T], int]] = []
        places = load.limits.rows if most is None else most
        passed_over = set[str]() if only is None else {tenant for tenant in self._lines if tenant != only}
        while places > 0 and (tenant := self._next(passed_over)) is not None:
            head = self._lines[tenant][0]
            count = load.fitting(head.length, min(head.samples, places), may_fill)
            if count == 0:
                passed_over.add(tenant)
                continue
            if not self._turns.can_spend(tenant, count * head.tokens):
                self._turns.grant(tenant)
                continue
            self._turns.spend(tenant, count * head.tokens)
            self._admit(tenant, head, count)
            admitted.append((head, count))
            load.add(head.length, count)
            places -= count
        return admitted

    def remove(self, is_meant: Callable[[T], bool]) -> None:
        """Forget requests, wherever they stand."""
        for tenant, line in list(self._lines.items()):
            self._lines[tenant] = deque(waiting for waiting in line if not is_meant(waiting.item))
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

    def _next(self, passed_over: AbstractSet[str]) -> str | None:
        return next((tenant for tenant in self._turns.in_turn() if tenant not in passed_over), None)

    def _admit(self, tenant: str, head: Waiting[T], count: int) -> None:
        head.samples -= count
        if head.samples == 0:
            line = self._lines[tenant]
            line.popleft()
            if not line:
                del self._lines[tenant]
                self._turns.deactivate(tenant)
