"""Deficit round robin (Shreedhar & Varghese, SIGCOMM 1995) between tenants whose samples wait, counted in tokens.

(Training's turns are `scheduling/turns.py`.) Each tenant who has something ready gets a quantum a round and spends it
on whole jobs; what a job costs beyond it is saved up for over rounds. So over time every busy tenant gets the same
number of tokens, however large its jobs are.
"""

from collections import OrderedDict


class DeficitRoundRobin:
    """Whose turn it is. Knows tenants only while they have something ready."""

    def __init__(self, quantum: int) -> None:
        """
        Args:
            quantum: tokens a tenant earns each round.
        """
        self._quantum = quantum
        self._deficits: OrderedDict[str, int] = OrderedDict()

    def activate(self, tenant: str) -> None:
        """The tenant has something ready."""
        self._deficits.setdefault(tenant, 0)

    def deactivate(self, tenant: str) -> None:
        """The tenant has nothing ready; what it saved is gone."""
        self._deficits.pop(tenant, None)

    def __bool__(self) -> bool:
        return bool(self._deficits)

    def first(self) -> str:
        """Whose turn it is; there must be one."""
        return next(iter(self._deficits))

    def in_turn(self) -> list[str]:
        """All tenants who have something ready, the one whose turn it is first."""
        return list(self._deficits)

    def grant(self, tenant: str) -> None:
        """Take a turn: earn a quantum and go to the end of the line."""
        self._deficits[tenant] += self._quantum
        self._deficits.move_to_end(tenant)

    def can_spend(self, tenant: str, tokens: int) -> bool:
        return self._deficits[tenant] >= tokens

    def spend(self, tenant: str, tokens: int) -> None:
        self._deficits[tenant] -= tokens
