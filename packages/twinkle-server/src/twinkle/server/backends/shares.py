"""Splits micro-batches into shares of about equal tokens: for threads, and for data-parallel ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from twinkle.protocol.types import Int64Array
from twinkle.server.backends.protocol import Row, RowResult

# What a share is filled up to, as fractions of the mean; of equals the first is taken.
_FILLINGS = tuple(1 - i / 20 for i in range(10))


def micro_batch_tokens(rows: Sequence[Row], packs: bool) -> int:
    """What a micro-batch of these rows takes: all their lengths if it packs them, else rows x longest row."""
    return int(_costs(rows, packs)[-1]) if rows else 0


def _costs(rows: Sequence[Row], packs: bool) -> Int64Array:
    """What the first 0, 1, ... of the rows take of the micro-batch."""
    lengths = np.array([len(row.tokens) for row in rows])
    if packs:
        return np.concatenate([[0], lengths.cumsum()])
    return np.arange(len(rows) + 1) * lengths.max()


def share_out(
    micro_batches: Sequence[Sequence[Row]], count: int, overhead_tokens: int, packs: bool = False
) -> list[list[Sequence[Row]]]:
    """Split micro-batches into shares of about equal tokens, each continuing where the last one ends.

    A share is filled up to the mean, and what does not fit begins the next (McNaughton 1959, Management Science 6(1)):
    so at most one micro-batch per share is cut in two, between rows. If the remainder has shorter rows it pads to less
    than before, so lower fillings than the mean are tried too.

    Args:
        count: how many shares there may be.
        overhead_tokens: what a micro-batch costs beside its tokens: none is cut that small.
        packs: whether rows are packed.

    Returns:
        At most `count` shares, none of them empty, unless there are no rows: then one.
    """
    if count == 1:
        return [list(micro_batches)]
    mean = sum(micro_batch_tokens(rows, packs) for rows in micro_batches) / count
    are_ragged = any(len({len(row.tokens) for row in rows}) > 1 for rows in micro_batches)
    tries = _FILLINGS if are_ragged else _FILLINGS[:1]
    filled = (_fill(micro_batches, count, filling * mean, overhead_tokens, packs) for filling in tries)
    return min(
        filled,
        key=lambda shares: max(sum(micro_batch_tokens(rows, packs) for rows in share) for share in shares),
    )


def _fill(
    micro_batches: Sequence[Sequence[Row]], most: int, filling: float, overhead_tokens: int, packs: bool
) -> list[list[Sequence[Row]]]:
    """As `share_out`, with at most `filling` tokens per share, to the nearest row; the last takes the rest."""
    shares: list[list[Sequence[Row]]] = [[]]
    room = filling
    for rows in micro_batches:
        while rows:
            costs = _costs(rows, packs)
            count = len(rows)
            if len(shares) < most:
                count = _fitting(costs, room, overhead_tokens, is_empty=not shares[-1])
            if count:
                shares[-1].append(rows[:count])
                rows, room = rows[count:], room - int(costs[count])
            if rows:
                shares.append([])
                room = filling
    return shares


def _fitting(costs: Int64Array, room: float, overhead_tokens: int, is_empty: bool) -> int:
    """How many of some rows fit into the rest of a share, to the nearest row; at least one if it is empty.

    Args:
        costs: what the first 0, 1, ... of them take.
    """
    count = len(costs) - 1
    fitting = int(np.abs(costs - room).argmin())
    if is_empty:
        fitting = max(1, fitting, min(count, int(costs.searchsorted(overhead_tokens))))
    if costs[count] - costs[fitting] < overhead_tokens:
        return count if fitting else 0
    return fitting if costs[fitting] >= overhead_tokens else 0


@dataclass(frozen=True, eq=False)
class RankShares:
    """Micro-batches shared out to data-parallel ranks, and their results put together.

    Shares are as even as `share_out` makes them. Among those, rows go to the rank that owns their adapter, as far as
    rows of one length can be exchanged: such a row's gradient need not be sent.

    Attributes:
        of_ranks: each rank's; empty for ranks that get no rows.
    """

    of_ranks: list[list[Sequence[Row]]]
    _ranks: list[int]  # of each share
    _orders: list[list[int]]  # of each micro-batch's rows, as shared out

    @classmethod
    def of(
        cls,
        micro_batches: Sequence[Sequence[Row]],
        ranks: int,
        overhead_tokens: int,
        owners: Mapping[str, int],
        packs: bool = False,
    ) -> RankShares:
        """
        Args:
            overhead_tokens: as for `share_out`.
            owners: rank by adapter; adapters that are missing may be any rank's.
            packs: as for `share_out`.
        """
        orders = [_by_owner(rows, owners) for rows in micro_batches]
        ordered = [[rows[i] for i in order] for rows, order in zip(micro_batches, orders, strict=True)]
        shares = share_out(ordered, ranks, overhead_tokens, packs)
        free = list(range(ranks))
        of_shares: list[int] = []
        for share in shares:
            owned = Counter[int]()
            for row in (row for rows in share for row in rows):
                owned[owners.get(row.adapter_id, -1)] += len(row.tokens)
            rank = max(free, key=owned.__getitem__)  # the first of equals
            free.remove(rank)
            of_shares.append(rank)
        of_ranks: list[list[Sequence[Row]]] = [[] for _ in range(ranks)]
        for rank, share in zip(of_shares, shares, strict=True):
            of_ranks[rank] = share
        return cls(of_ranks, of_shares, orders)

    def put_together(self, by_rank: Sequence[Sequence[Sequence[RowResult]]]) -> list[list[RowResult]]:
        """The results by micro-batch and row, from each rank's."""
        results = (result for rank in self._ranks for part in by_rank[rank] for result in part)
        found: list[list[RowResult]] = []
        for order in self._orders:
            of_rows = {i: next(results) for i in order}
            found.append([of_rows[i] for i in range(len(order))])
        return found


def _by_owner(rows: Sequence[Row], owners: Mapping[str, int]) -> list[int]:
    """An order in which rows that follow each other and are equally long are by owner."""
    order: list[int] = []
    for _, alike in groupby(range(len(rows)), key=lambda i: len(rows[i].tokens)):
        order += sorted(alike, key=lambda i: owners.get(rows[i].adapter_id, -1))
    return order
