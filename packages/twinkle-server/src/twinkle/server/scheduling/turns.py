"""Whose turn it is among tenants with training passes ready, counted in tokens.

Start-time fair queueing (Goyal, Vin & Cheng, SIGCOMM 1996): a tenant's tag is what it has been given, and who has been
given least is next. One that had no work begins where those who had it are now, so nobody saves up. It looks at those
whose turn it is and never at all who wait, so a turn costs the logarithm of their number.
"""

import heapq
from collections.abc import Iterable
from itertools import count
from typing import TypeAlias

# Tag, number of the tenant's last turn, number of the place, tenant: of equal tags the least recently served is first.
_Place: TypeAlias = tuple[int, int, int, str]

# Places that no longer hold, and tags of tenants who owe nothing, are cleared away when there are so many.
_MOST_STALE = 1024


class Turns:
    """Tags of tenants with work ready, and of those without who have been given more than others.

    A tenant without work keeps its tag while others have work, so that it gets no more by coming and going. Only beside
    a single other one it owes nothing when it is back: a client that waits for each result before it sends more takes
    at most twice as long as alone beside one that floods the server, however large its batches.
    """

    def __init__(self) -> None:
        self._tags: dict[str, int] = {}
        self._last_turn: dict[str, int] = {}  # its number, of tenants with tags
        self._places: dict[str, _Place] = {}  # tenants with work ready
        self._order: list[_Place] = []  # a heap; has places that no longer hold, and none of those taken out
        self._out: set[str] = set()  # tenants taken out
        self._numbers = count(1)
        self._most_tags = _MOST_STALE
        self._least = 0  # smallest tag of those with work, when it was last looked at
        self._earned = 0  # tenants whose tags are below it may bring something

    def activate(self, tenant: str) -> None:
        """The tenant has work ready."""
        if tenant not in self._places:
            owed = self._tags.get(tenant, 0) if len(self._places) > 1 else 0
            self._tags[tenant] = max(self._least, owed)
            self._place(tenant)

    def deactivate(self, tenant: str) -> None:
        """The tenant has nothing ready."""
        self._places.pop(tenant, None)
        if not self._places:  # nobody has to wait for anybody
            self._tags.clear()
            self._last_turn.clear()
            self._order.clear()
            self._least = self._earned = 0
        elif len(self._tags) > self._most_tags:
            self._tags = {t: tag for t, tag in self._tags.items() if tag > self._least or t in self._places}
            self._last_turn = {t: number for t, number in self._last_turn.items() if t in self._tags}
            self._most_tags = 2 * len(self._tags) + _MOST_STALE

    def charge(self, tenant: str, tokens: int) -> None:
        """The tenant was given tokens. One with work ready gets its new place when it is put back."""
        if self._places:
            self._tags[tenant] = self._tags.get(tenant, self._least) + tokens
            self._last_turn[tenant] = next(self._numbers)

    def take_first(self, most: int) -> list[str]:
        """Take out so many tenants with work ready, those who have been given least first, until they are put back."""
        taken: list[str] = []
        while self._order and len(taken) < most:
            place = heapq.heappop(self._order)
            if self._holds(place):
                taken.append(place[-1])
        self._out.update(taken)
        return taken

    def put_back(self, tenants: Iterable[str]) -> None:
        """Put tenants back who were taken out, or charged since: all of them at once."""
        for tenant in tenants:
            if tenant in self._places:
                self._place(tenant)
        self._out.clear()

    def earn(self, share: int, least: str) -> None:
        """Let each tenant bring `share` more tokens, but nobody more than two shares.

        Args:
            least: who has been given least of those with work.
        """
        self._least = self._tags[least]
        self._earned = min(max(self._earned, self._least) + share, self._least + 2 * share)

    def settle(self, tenant: str) -> None:
        """A tenant that is alone has saved nothing."""
        if tenant in self._places:
            self._place(tenant)
            self._least = self._earned = self._tags[tenant]

    def balance(self, tenant: str) -> int:
        """Tokens that a tenant may bring now; negative if it has been given too many."""
        return self._earned - self._tags[tenant]

    def _place(self, tenant: str) -> None:
        tag, place = self._tags[tenant], self._places.get(tenant)
        if place is None or place[0] != tag:
            place = tag, self._last_turn.get(tenant, 0), next(self._numbers), tenant
            self._places[tenant] = place
        elif tenant not in self._out:
            return  # it is where it was
        heapq.heappush(self._order, place)
        if len(self._order) > 2 * len(self._places) + _MOST_STALE:
            self._order = [each for each in self._order if self._holds(each)]
            heapq.heapify(self._order)

    def _holds(self, place: _Place) -> bool:
        return self._places.get(place[-1]) is place
