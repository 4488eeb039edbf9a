"""Which rank gets which rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twinkle.server.backends.protocol import Row, RowResult
from twinkle.server.backends.shares import RankShares, micro_batch_tokens, share_out


def row(adapter: str, length: int, number: int = 0) -> Row:
    return Row(adapter, np.full(length, number), "cross_entropy", {})


def adapters(shares: RankShares) -> list[list[list[str]]]:
    return [[[row.adapter_id for row in rows] for rows in share] for share in shares.of_ranks]


def test_rows_go_to_the_rank_that_owns_their_adapter() -> None:
    owners = {"a": 0, "b": 1, "c": 0, "d": 1}
    rows = [row(name, 8) for name in "abcd"]
    assert adapters(RankShares.of([rows], 2, 1, owners)) == [[["a", "c"]], [["b", "d"]]]
    assert adapters(RankShares.of([rows], 2, 1, {})) == [[["a", "b"]], [["c", "d"]]]


def test_shares_stay_even_whoever_owns_the_adapters() -> None:
    rows = [row(name, 8) for name in "abac"]
    assert adapters(RankShares.of([rows], 2, 1, {"a": 1, "b": 1, "c": 1})) == [[["a", "c"]], [["a", "b"]]]


def test_what_is_too_little_for_two_ranks_goes_to_the_owner() -> None:
    shares = RankShares.of([[row("b", 8), row("b", 8)]], 2, overhead_tokens=16, owners={"b": 1})
    assert adapters(shares) == [[], [["b", "b"]]]


def test_no_row_moves_to_where_it_would_pad_more() -> None:
    """The long row of rank 1's adapter stays beside the other long one."""
    owners = {"a": 0, "b": 1}
    rows = [row("b", 30), row("a", 30), row("a", 8), row("b", 8), row("b", 8)]
    shares = RankShares.of([rows], 2, 1, owners).of_ranks
    assert sorted(micro_batch_tokens(rows, packs=False) for share in shares for rows in share) == [24, 60]


@given(
    batches=st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9)), max_size=9), max_size=4),
    ranks=st.integers(1, 4),
    owners=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3)),
)
def test_each_row_is_computed_once_and_results_are_in_order(
    batches: list[list[tuple[str, int]]], ranks: int, owners: dict[str, int]
) -> None:
    owners = {name: rank % ranks for name, rank in owners.items()}
    number = 0
    micro_batches: list[list[Row]] = []
    for batch in batches:
        micro_batches.append([row(name, length, number + i) for i, (name, length) in enumerate(batch)])
        number += len(batch)
    shares = RankShares.of(micro_batches, ranks, 5, owners)
    assert len(shares.of_ranks) == ranks
    results = [
        [[RowResult(np.zeros(1, np.float32), float(row.tokens[0])) for row in rows] for rows in share]
        for share in shares.of_ranks
    ]
    found = shares.put_together(results)
    assert [[result.loss for result in rows] for rows in found] == [
        [float(row.tokens[0]) for row in rows] for rows in micro_batches
    ]
    sizes = [
        sum(micro_batch_tokens(rows, packs=False) for rows in share) for share in shares.of_ranks if share
    ]
    without = [
        sum(micro_batch_tokens(rows, packs=False) for rows in share)
        for share in share_out(micro_batches, ranks, 5)
        if share
    ]
    assert sorted(sizes) == sorted(without), "as even as without owners"
