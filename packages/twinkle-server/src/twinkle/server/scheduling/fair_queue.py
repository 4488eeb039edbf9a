"""The fair queue: whose turn it is among tenants with samples that wait, counted in tokens.

Surplus round robin (Adiseshu, Parulkar & Varghese, SIGCOMM 1996): a tenant with a positive balance may run a job that
costs more than that, and owes the difference. Over time, all tenants that always have work get the same number of
tokens, however large their jobs: two of them never differ by more than a share plus the largest job of each.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

# How many tenants' last turns are remembered.
_REMEMBERED = 4096


class FairQueue:
    """Balances of tenants with work ready, and debts of tenants without.

    A tenant with no work left loses its savings but keeps its last turn, so a tenant that comes and goes is neither
    ahead of nor behind one that is always there.
    """

    def __init__(self) -> None:
        self._balances: dict[str, int] = {}  # tenants with work ready
        self._debts: dict[str, int] = {}  # negative balances of tenants without
        self._last_turn: OrderedDict[str, int] = OrderedDict()  # least recent first
        self._turns = 0

    def activate(self, tenant: str) -> None:
        """The tenant has work ready."""
        if tenant not in self._balances:
            self._balances[tenant] = self._debts.pop(tenant, 0)

    def deactivate(self, tenant: str) -> None:
        """The tenant has nothing ready. It keeps its debt while others have work."""
        balance = self._balances.pop(tenant, 0)
        if balance < 0:
            self._debts[tenant] = balance
        if not self._balances:
            self._debts.clear()

    def in_turn(self) -> list[str]:
        """Tenants with work ready, least recently served first."""
        return sorted(self._balances, key=lambda tenant: self._last_turn.get(tenant, 0))

    def earn(self, share: int, among: Iterable[str] | None = None) -> None:
        """Give each tenant `share` tokens, or as many as it takes for one of `among` (default: all) to have a balance.
        Nobody saves more than two shares.
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
        """Charge the tenant for a turn. (Free if that was its last work and it has been deactivated.)"""
        if tenant in self._balances:
            self._balances[tenant] -= tokens
        self._turns += 1
        self._last_turn[tenant] = self._turns
        self._last_turn.move_to_end(tenant)
        if len(self._last_turn) > _REMEMBERED:
            self._last_turn.popitem(last=False)

    def settle(self, tenant: str) -> None:
        """Clear the tenant's savings or debt."""
        if tenant in self._balances:
            self._balances[tenant] = 0

    def put_first(self, tenants: Sequence[str]) -> None:
        """Put these tenants' turns before all others', in this order."""
        for number, tenant in enumerate(tenants):
            self._last_turn[tenant] = number - len(tenants)
            self._last_turn.move_to_end(tenant)
