"""Micro-batches side by side: on a CPU a pass is shared out among lanes, each with a network and threads of its own.

Threads that share every product wait for one another at the end of each, and all of them for one whose core another
process has taken. Lanes meet once a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from twinkle.server.backends.protocol import Row

# Each lane holds gradients of its own, and a micro-batch's activations.
MOST_LANES = 4

# What a lane is filled up to, as shares of the mean; of equals the first is taken.
_FILLINGS = tuple(1 - i / 20 for i in range(10))

Network = TypeVar("Network")
Share = TypeVar("Share")
Result = TypeVar("Result")


class Lanes(Generic[Network]):
    """Networks that compute at the same time: the first in the caller's thread, each other in one of its own."""

    def __init__(self, networks: Sequence[Network]) -> None:
        """
        Args:
            networks: at least one; they share weights and nothing else.
        """
        self._networks = list(networks)
        self._pool = ThreadPoolExecutor(max(1, len(networks) - 1), "lane")

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def first(self) -> Network:
        return self._networks[0]

    def run(self, work: Callable[[Network, Share], Result], shares: Sequence[Share]) -> list[Result]:
        """Each share's result. Returns, or raises what one of them raised, when all of them have ended.

        Args:
            shares: at least one, at most as many as there are lanes.
        """
        others = [
            self._pool.submit(work, network, share)
            for network, share in zip(self._networks[1:], shares[1:], strict=False)
        ]
        try:
            first = work(self._networks[0], shares[0])
        finally:
            wait(others)
        return [first, *(other.result() for other in others)]

    def close(self) -> None:
        self._pool.shutdown()


def padded_tokens(rows: Sequence[Row]) -> int:
    """What a micro-batch of these rows takes: rows x longest row."""
    return len(rows) * max((len(row.tokens) for row in rows), default=0)


def share_out(
    micro_batches: Sequence[Sequence[Row]], lanes: int, overhead_tokens: int
) -> list[list[Sequence[Row]]]:
    """Micro-batches by lane, so that all lanes have about as many tokens; each share goes on where the last one ends.

    A lane is filled up to the mean, and what does not fit begins the next (McNaughton 1959, Management Science 6(1)):
    so at most one micro-batch a lane is cut in two, between rows. Where what is left of one has shorter rows it takes
    less than before, so lower fillings than the mean are tried too.

    Args:
        overhead_tokens: what a micro-batch costs beside its tokens: none is cut that small.

    Returns:
        At most `lanes` shares, none of them empty, unless there are no rows: then one.
    """
    mean = sum(map(padded_tokens, micro_batches)) / lanes
    are_ragged = any(len({len(row.tokens) for row in rows}) > 1 for rows in micro_batches)
    tries = _FILLINGS if are_ragged else _FILLINGS[:1]
    filled = (_fill(micro_batches, lanes, filling * mean, overhead_tokens) for filling in tries)
    return min(filled, key=lambda shares: max(sum(map(padded_tokens, share)) for share in shares))


def _fill(
    micro_batches: Sequence[Sequence[Row]], lanes: int, filling: float, overhead_tokens: int
) -> list[list[Sequence[Row]]]:
    """As `share_out`, with so many tokens a lane at most, to the nearest row; the last takes what is left."""
    shares: list[list[Sequence[Row]]] = [[]]
    room = filling
    for rows in micro_batches:
        while rows:
            width = max(len(row.tokens) for row in rows)
            count = len(rows)
            if len(shares) < lanes:
                count = _fitting(count, width, room, overhead_tokens, is_empty=not shares[-1])
            if count:
                shares[-1].append(rows[:count])
                rows, room = rows[count:], room - count * width
            if rows:
                shares.append([])
                room = filling
    return shares


def _fitting(count: int, width: int, room: float, overhead_tokens: int, is_empty: bool) -> int:
    """How many of `count` rows go into what is left of a lane, to the nearest row; at least one if it is empty."""
    least = max(1, -(-overhead_tokens // max(1, width)))
    fitting = min(count, max(least if is_empty else 0, round(room / max(1, width))))
    if count - fitting < least:
        return count if fitting else 0
    return fitting if fitting >= least else 0
