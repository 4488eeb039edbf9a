"""How long a tick waits for more runs."""

from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from twinkle.server.scheduling.runs import Run

# A run that was in none of this many ticks is no longer active.
_REMEMBERED_TICKS = 16


class BatchingWindow:
    """How long a tick waits for more runs.

    A tick has a fixed cost, so runs whose requests arrive close together are better computed together. But a run whose
    client is still busy with its last result is not worth waiting for. So a tick waits for half of the active runs:
    while they are computed, the clients of the other half prepare their next requests.

    Attributes:
        seconds: the longest wait.
        enough_tokens: a tick begins at once if this many are queued.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.enough_tokens = 0
        self._ticks: deque[frozenset[Run]] = deque()
        self._active: Counter[Run] = Counter()

    def add_tick(self, runs: Iterable[Run]) -> None:
        """Count these runs, which were in a tick, as active for a while."""
        tick = frozenset(runs)
        self._ticks.append(tick)
        self._active.update(tick)
        if len(self._ticks) > _REMEMBERED_TICKS:
            for run in self._ticks.popleft():
                self._active[run] -= 1
                if not self._active[run]:
                    del self._active[run]

    def num_active_beside(self, runs: AbstractSet[Run]) -> int:
        """The number of active runs that are not among these."""
        return len(self._active.keys() - runs)

    @property
    def num_wanted(self) -> int:
        """How many ready runs start a tick at once; at least 1."""
        return max(1, (len(self._active) + 1) // 2)
