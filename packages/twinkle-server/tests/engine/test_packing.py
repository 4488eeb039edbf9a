"""Where rows are cut into micro-batches: against the best of all ways to cut, tried one by one."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.server.engine.packing import cuts


def cost(lengths: list[int], ends: list[int], overhead: int) -> int:
    """Padded tokens, and the overhead of each micro-batch."""
    bounds = list(zip([0, *ends], [*ends, len(lengths)], strict=True))
    return sum((end - start) * lengths[start] + overhead for start, end in bounds)


def cheapest(lengths: list[int], overhead: int) -> int:
    places = range(1, len(lengths))
    ways = (list(way) for count in range(len(lengths)) for way in combinations(places, count))
    return min(cost(lengths, way, overhead) for way in ways)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    budget=st.integers(1, 4000),
    overhead=st.integers(0, 1000),
)
def test_every_micro_batch_keeps_within_the_budget_or_is_one_row(
    lengths: list[int], budget: int, overhead: int
):
    falling = sorted(lengths, reverse=True)
    ends = cuts(np.array(falling), budget, overhead)
    assert ends == sorted(set(ends)) and all(0 < end < len(falling) for end in ends)
    for start, end in zip([0, *ends], [*ends, len(falling)], strict=True):
        assert (end - start) * falling[start] <= budget or end - start == 1


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), overhead=st.integers(0, 400))
def test_what_it_costs_is_close_to_the_best_way_to_cut(lengths: list[int], overhead: int):
    falling = sorted(lengths, reverse=True)
    ends = cuts(np.array(falling), 10**9, overhead)
    assert cost(falling, ends, overhead) <= 1.1 * cheapest(falling, overhead)
    assert cost(falling, ends, overhead) <= cost(falling, [], overhead)


@pytest.mark.parametrize(
    ("lengths", "budget", "overhead", "expected"),
    [
        ([7] * 8, 1000, 0, []),  # nothing to save
        ([7] * 8, 21, 100, [3, 6]),
        ([100, 10, 10, 10], 1000, 269, [1]),
        ([100, 10, 10, 10], 1000, 270, []),
        ([100, 60, 10], 1000, 0, [1, 2]),
    ],
)
def test_examples(lengths: list[int], budget: int, overhead: int, expected: list[int]):
    assert cuts(np.array(lengths), budget, overhead) == expected
