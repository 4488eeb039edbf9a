"""Splits micro-batches into shares of about equal tokens: for threads, and for data-parallel ranks."""

from collections.abc import Sequence

from twinkle.server.backends.protocol import Row

# What a share is filled up to, as fractions of the mean; of equals the first is taken.
_FILLINGS = tuple(1 - i / 20 for i in range(10))


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
