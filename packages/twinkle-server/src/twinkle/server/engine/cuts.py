"""Where to cut rows into micro-batches."""

import numpy as np

from twinkle.protocol.types import Int64Array
from twinkle.server.backends.protocol import BaseModelInfo

# How many ends of a micro-batch are tried.
_MOST_ENDS = 256


def ends_of(lengths: Int64Array, info: BaseModelInfo) -> list[int]:
    """Where to cut rows into micro-batches: the indices at which one begins, except the first.

    Args:
        lengths: at least one; descending, unless rows are packed.
    """
    if not info.packs_rows:
        return cuts(lengths, info.max_batch_tokens, info.overhead_tokens)
    found: list[int] = []
    filled = 0
    for row, length in enumerate(lengths.tolist()):
        if filled and filled + length > info.max_batch_tokens:
            found.append(row)
            filled = 0
        filled += length
    return found


def cuts(lengths: Int64Array, max_tokens: int, overhead: int) -> list[int]:
    """Where to cut rows into micro-batches: the indices at which one begins, except the first.

    Minimizes padded tokens plus overheads and, among equals, prefers few cuts: dynamic programming from the end, over
    where the first of the remaining micro-batches ends. (Where micro-batches of many short rows are possible, not every
    end is tried, so that the search takes no longer than it saves.)

    Args:
        lengths: descending, at least one.
        max_tokens: limit of rows x longest row, exceeded only by a single row that is longer.
    """
    count = len(lengths)
    least = np.zeros(count + 1, np.int64)  # by row, the cost from there to the end
    end_of = np.zeros(count, np.int64)
    for start in range(count - 1, -1, -1):
        most_rows = max(1, min(count - start, max_tokens // max(1, int(lengths[start]))))
        # Descending: among equals the first is taken, with the fewest cuts.
        rows = np.arange(most_rows, 0, -(1 + most_rows // _MOST_ENDS))
        costs = rows * lengths[start] + overhead + least[start + rows]
        best = int(costs.argmin())
        least[start], end_of[start] = costs[best], start + rows[best]
    found: list[int] = []
    end = int(end_of[0])
    while end < count:
        found.append(end)
        end = int(end_of[end])
    return found
