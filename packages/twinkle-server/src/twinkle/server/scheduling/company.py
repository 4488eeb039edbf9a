"""Whether a tick should wait a moment for more runs.

A tick costs something however few runs are in it, so runs that come one after the other are better taken together. On
the other hand a run whose client is busy with the last result is not to be waited for. So half of the runs that have
been coming are wanted: while they are computed, the other half's clients prepare their next requests.
"""

from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

# A run that was in none of so many ticks is not expected any more.
_REMEMBERED_TICKS = 16


class Company:
    """The runs that have been coming."""

    def __init__(self) -> None:
        self._ticks: deque[frozenset[str]] = deque()
        self._active: Counter[str] = Counter()

    def took_part(self, run_ids: Iterable[str]) -> None:
        """These runs were in a tick."""
        runs = frozenset(run_ids)
        self._ticks.append(runs)
        self._active.update(runs)
        if len(self._ticks) > _REMEMBERED_TICKS:
            for run_id in self._ticks.popleft():
                self._active[run_id] -= 1
                if not self._active[run_id]:
                    del self._active[run_id]

    def beside(self, run_ids: AbstractSet[str]) -> int:
        """How many of them are not these."""
        return len(self._active.keys() - run_ids)

    @property
    def wanted(self) -> int:
        """How many runs make a tick worth starting at once; at least 1."""
        return max(1, (len(self._active) + 1) // 2)
