"""Where rows are cut into micro-batches: against the best of all ways to cut, tried one by one."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.server.engine.cuts import cuts


def cost(lengths: list[int], ends: list[int], overhead: int) -> int:
    """Padded tokens, and the overhead of each micro-batch."""
    bounds = list(zip([0, *ends], [*ends, len(lengths)], strict=True))
    return sum((end - start) * lengths[start] + overhead for start, end in bounds)


def cheapest(lengths: list[int], budget: int, overhead: int) -> int:
    places = range(1, len(lengths))
    ways = (list(way) for count in range(len(lengths)) for way in combinations(places, count))
    return min(cost(lengths, way, overhead) for way in ways if is_within(lengths, way, budget))


def is_within(lengths: list[int], ends: list[int], budget: int) -> bool:
    bounds = zip([0, *ends], [*ends, len(lengths)], strict=True)
    return all((end - start) * lengths[start] <= budget or end - start == 1 for start, end in bounds)


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
    assert is_within(falling, ends, budget)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9),
    budget=st.integers(1, 2000),
    overhead=st.integers(0, 400),
)
def test_no_other_way_to_cut_costs_less(lengths: list[int], budget: int, overhead: int):
    falling = sorted(lengths, reverse=True)
    ends = cuts(np.array(falling), budget, overhead)
    assert cost(falling, ends, overhead) == cheapest(falling, budget, overhead)


@given(seed=st.integers(0, 2**32 - 1), longest=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_many_short_rows_cost_hardly_more_than_at_best(seed: int, longest: int):
    falling = np.sort(np.random.default_rng(seed).integers(1, longest + 1, 3000))[::-1]
    lengths, overhead = falling.tolist(), 609
    ends = cuts(falling, 8192, overhead)
    assert is_within(lengths, ends, 8192)
    # No less than the tokens themselves, in as few micro-batches as hold them.
    at_least = sum(lengths) + overhead * -(-sum(lengths) // 8192)
    one_length_each = [end for end in range(1, len(lengths)) if lengths[end] != lengths[end - 1]]
    assert at_least <= cost(lengths, ends, overhead) <= 1.02 * cost(lengths, one_length_each, overhead)


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
