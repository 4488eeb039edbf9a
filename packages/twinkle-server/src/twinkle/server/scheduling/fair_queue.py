"""Whose turn it is among tenants with work ready, counted in tokens: training's ticks and sampling's slots.

Surplus round robin (Adiseshu, Parulkar & Varghese, SIGCOMM 1996): a tenant with a positive balance may have a job that
costs more, and owes the difference. So over time all tenants that always have work get the same number of tokens,
however large their jobs: two of them never differ by more than a share and the largest job of each.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

# How many tenants' latest turns are remembered.
_REMEMBERED = 4096


class FairQueue:
    """Balances of the tenants that have work ready, and debts of those that had.

    Savings are lost when a tenant has nothing left. Its latest turn is not forgotten, so a tenant that comes and goes
    is neither ahead of nor behind one that is always there.
    """

    def __init__(self) -> None:
        self._balances: dict[str, int] = {}  # of the tenants that have work ready
        self._debts: dict[str, int] = {}  # negative balances of tenants that have none
        self._last_turn: OrderedDict[str, int] = OrderedDict()  # least recent first
        self._turns = 0

    def activate(self, tenant: str) -> None:
        """The tenant has work ready."""
        if tenant not in self._balances:
            self._balances[tenant] = self._debts.pop(tenant, 0)

    def deactivate(self, tenant: str) -> None:
        """The tenant has nothing ready. It still owes what it owed while others have work."""
        balance = self._balances.pop(tenant, 0)
        if balance < 0:
            self._debts[tenant] = balance
        if not self._balances:
            self._debts.clear()

    def in_turn(self) -> list[str]:
        """All tenants that have work ready, the one whose latest turn is longest ago first."""
        return sorted(self._balances, key=lambda tenant: self._last_turn.get(tenant, 0))

    def earn(self, share: int, among: Iterable[str] | None = None) -> None:
        """Each gets `share` tokens, or as many as it takes for one of `among` (default: all) to have a balance; nobody
        saves more than two shares.
        """
        richest = max(self._balances[tenant] for tenant in (self._balances if among is None else among))
        amount = max(share, 1 - richest)
        for tenant, balance in self._balances.items():
            self._balances[tenant] = min(balance + amount, 2 * share)
        debts = {tenant: debt + amount for tenant, debt in self._debts.items()}
        self._debts = {tenant: debt for tenant, debt in debts.items() if debt < 0}

    def balance(self, tenant: str) -> int:
        return self._balances[tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        """The tenant had a turn and took so many tokens. (If that was all it had, and it has been deactivated, it has
        left for free.)
        """
        if tenant in self._balances:
            self._balances[tenant] -= tokens
        self._turns += 1
        self._last_turn[tenant] = self._turns
        self._last_turn.move_to_end(tenant)
        if len(self._last_turn) > _REMEMBERED:
            self._last_turn.popitem(last=False)

    def settle(self, tenant: str) -> None:
        """The tenant neither has savings nor owes."""
        if tenant in self._balances:
            self._balances[tenant] = 0

    def put_first(self, tenants: Sequence[str]) -> None:
        """Their turns come before all others', in this order."""
        for number, tenant in enumerate(tenants):
            self._last_turn[tenant] = number - len(tenants)
            self._last_turn.move_to_end(tenant)
