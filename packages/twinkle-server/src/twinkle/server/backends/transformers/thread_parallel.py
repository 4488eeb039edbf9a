"""Data parallelism over the threads of one process: on a CPU each network takes a share of a pass's rows.

Threads that split every matrix product (torch's intra-op parallelism) wait for one another at the end of each, and all
of them for one whose core another process has taken. Networks with a share each wait once a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from twinkle.server.backends.protocol import Row

# Each network holds gradients of its own, and a micro-batch's activations.
MAX_NETWORKS = 4

# What a share is filled up to, as fractions of the mean; of equals the first is taken.
_FILLINGS = tuple(1 - i / 20 for i in range(10))

Network = TypeVar("Network")
Share = TypeVar("Share")
Result = TypeVar("Result")


class ParallelNetworks(Generic[Network]):
    """Networks that compute at the same time: the first in the caller's thread, each other in one of its own."""

    def __init__(self, networks: Sequence[Network]) -> None:
        """At least one network; they share weights and nothing else."""
        self._networks = list(networks)
        self._pool = ThreadPoolExecutor(max(1, len(networks) - 1), "pass")

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def first(self) -> Network:
        return self._networks[0]

    def run(self, work: Callable[[Network, Share], Result], shares: Sequence[Share]) -> list[Result]:
        """Each share's result. Returns, or raises what one of them raised, when all of them have ended.

        Args:
            shares: at least one, at most as many as there are networks.
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
    micro_batches: Sequence[Sequence[Row]], count: int, overhead_tokens: int
) -> list[list[Sequence[Row]]]:
    """Split micro-batches into shares of about equal tokens, each continuing where the last one ends.

    A share is filled up to the mean, and what does not fit begins the next (McNaughton 1959, Management Science 6(1)):
    so at most one micro-batch per share is cut in two, between rows. If the remainder has shorter rows it pads to less
    than before, so lower fillings than the mean are tried too.

    Args:
        count: how many shares there may be.
        overhead_tokens: what a micro-batch costs beside its tokens: none is cut that small.

    Returns:
        At most `count` shares, none of them empty, unless there are no rows: then one.
    """
    mean = sum(map(padded_tokens, micro_batches)) / count
    are_ragged = any(len({len(row.tokens) for row in rows}) > 1 for rows in micro_batches)
    tries = _FILLINGS if are_ragged else _FILLINGS[:1]
    filled = (_fill(micro_batches, count, filling * mean, overhead_tokens) for filling in tries)
    return min(filled, key=lambda shares: max(sum(map(padded_tokens, share)) for share in shares))


def _fill(
    micro_batches: Sequence[Sequence[Row]], most: int, filling: float, overhead_tokens: int
) -> list[list[Sequence[Row]]]:
    """As `share_out`, with at most `filling` tokens per share, to the nearest row; the last takes the rest."""
    shares: list[list[Sequence[Row]]] = [[]]
    room = filling
    for rows in micro_batches:
        while rows:
            width = max(len(row.tokens) for row in rows)
            count = len(rows)
            if len(shares) < most:
                count = _fitting(count, width, room, overhead_tokens, is_empty=not shares[-1])
            if count:
                shares[-1].append(rows[:count])
                rows, room = rows[count:], room - count * width
            if rows:
                shares.append([])
                room = filling
    return shares


def _fitting(count: int, width: int, room: float, overhead_tokens: int, is_empty: bool) -> int:
    """How many of `count` rows fit into the rest of a share, to the nearest row; at least one if it is empty."""
    least = max(1, -(-overhead_tokens // max(1, width)))
    fitting = min(count, max(least if is_empty else 0, round(room / max(1, width))))
    if count - fitting < least:
        return count if fitting else 0
    return fitting if fitting >= least else 0
