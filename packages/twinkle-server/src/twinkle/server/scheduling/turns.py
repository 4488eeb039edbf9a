"""Whose turn it is between tenants who have training work ready, and what each may bring, counted in tokens.

Surplus round robin (Adiseshu, Parulkar & Varghese, SIGCOMM 1996): who has a balance may bring a job that is larger, and
then owes what is missing. So over time all who are always busy get the same number of tokens, however large their jobs.
"""

from collections import OrderedDict
from collections.abc import Sequence

# Of so many tenants it is known when they had their last turn.
_REMEMBERED = 4096


class Turns:
    """Balances of the tenants who have something ready; what one saved or owed is forgotten when it has nothing left.

    That it had a turn is not, so one who comes and goes is neither before nor behind one who is always there.
    """

    def __init__(self) -> None:
        self._balances: dict[str, int] = {}
        self._last_turn: OrderedDict[str, int] = OrderedDict()  # the longest ago is first
        self._turns = 0

    def activate(self, tenant: str) -> None:
        """The tenant has something ready."""
        self._balances.setdefault(tenant, 0)

    def deactivate(self, tenant: str) -> None:
        """The tenant has nothing ready."""
        self._balances.pop(tenant, None)

    def in_turn(self) -> list[str]:
        """All tenants who have something ready, the one whose last turn is longest ago first."""
        return sorted(self._balances, key=lambda tenant: self._last_turn.get(tenant, 0))

    def earn(self, share: int) -> None:
        """Each gets `share` tokens, and more if all owe; what was saved up beyond a share is lost."""
        for tenant, balance in self._balances.items():
            self._balances[tenant] = min(balance, share) + share
        missing = 1 - max(self._balances.values())
        if missing > 0:
            for tenant in self._balances:
                self._balances[tenant] += missing

    def balance(self, tenant: str) -> int:
        return self._balances[tenant]

    def had_turn(self, tenant: str, tokens: int) -> None:
        """It brought so many; it may have nothing more."""
        if tenant in self._balances:
            self._balances[tenant] -= tokens
        self._turns += 1
        self._last_turn[tenant] = self._turns
        self._last_turn.move_to_end(tenant)
        if len(self._last_turn) > _REMEMBERED:
            self._last_turn.popitem(last=False)

    def settle(self, tenant: str) -> None:
        """It neither has anything nor owes: nobody else was there."""
        if tenant in self._balances:
            self._balances[tenant] = 0

    def put_first(self, tenants: Sequence[str]) -> None:
        """Their turn comes before all others', in this order."""
        for number, tenant in enumerate(tenants):
            self._last_turn[tenant] = number - len(tenants)
            self._last_turn.move_to_end(tenant)
