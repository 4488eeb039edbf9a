"""Advantages token by token: REINFORCE++ and generalized advantage estimation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from twinkle.advantage import gae_advantages, reinforce_plus_plus_advantages
from twinkle.protocol.errors import InvalidRequest

GRID = st.integers(-40, 40).map(lambda n: n / 8)
COMPLETIONS = st.lists(st.tuples(GRID, st.lists(GRID, max_size=5)), min_size=1, max_size=6)
TRAJECTORIES = st.lists(st.tuples(GRID, GRID), min_size=1, max_size=12)
UNIT = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@given(COMPLETIONS, st.sampled_from([0.0, 0.1, 2.0]))
def test_reinforce_plus_plus_is_its_formula(
    completions: list[tuple[float, list[float]]], coef: float
) -> None:
    raw = [[reward - coef * sum(kl[t:]) for t in range(len(kl))] for reward, kl in completions]
    tokens = [token for row in raw for token in row]
    assume(tokens and max(tokens) - min(tokens) > 1e-3)
    mean = sum(tokens) / len(tokens)
    deviation = (sum((token - mean) ** 2 for token in tokens) / len(tokens)) ** 0.5
    advantages = reinforce_plus_plus_advantages(
        [reward for reward, _ in completions],
        [len(kl) for _, kl in completions],
        kl=[kl for _, kl in completions],
        kl_coef=coef,
        eps=0,
    )
    assert len(advantages) == len(completions)
    for got, row in zip(advantages, raw, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, [(token - mean) / deviation for token in row], rtol=1e-4, atol=1e-5)
    together = np.concatenate(advantages)
    assert abs(together.mean()) < 1e-5 and abs(together.std() - 1) < 1e-5


def test_without_kl_all_tokens_of_a_completion_are_equal_and_long_ones_weigh_more() -> None:
    advantages = reinforce_plus_plus_advantages([1.0, 0.0], [3, 1], eps=0)
    # Tokens are 1, 1, 1, 0: mean 3/4, deviation sqrt(3)/4.
    np.testing.assert_allclose(advantages[0], [1 / 3**0.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(advantages[1], [-(3**0.5)], rtol=1e-6)


def test_the_baseline_takes_off_the_mean_of_the_group_first() -> None:
    rewards = [1.0, 0.0, 10.0, 8.0]
    lengths = [2, 1, 1, 3]
    advantages = reinforce_plus_plus_advantages(rewards, lengths, group_size=2)
    by_hand = reinforce_plus_plus_advantages([0.5, -0.5, 1.0, -1.0], lengths)
    for got, expected in zip(advantages, by_hand, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_equal_tokens_give_exact_zeros() -> None:
    for group_size in (None, 3):
        advantages = reinforce_plus_plus_advantages([0.1] * 3, [2, 0, 4], group_size=group_size, eps=0)
        assert [row.tolist() for row in advantages] == [[0, 0], [], [0, 0, 0, 0]]
    assert reinforce_plus_plus_advantages([], []) == []


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0, 2.0], [3]), {}, "lengths: 1 lengths for 2 rewards"),
        (([1.0], [-1]), {}, r"lengths\[0\]: -1; allowed are whole numbers from 0"),
        (([1.0], [2.0]), {}, r"lengths\[0\]: 2.0"),
        (([float("nan")], [1]), {}, r"rewards\[0\]: nan"),
        (([1.0], [2]), {"kl": [[0.1]], "kl_coef": 1.0}, r"kl\[0\]: 1 entries for lengths\[0\] = 2"),
        (([1.0], [1]), {"kl": [], "kl_coef": 1.0}, "kl: 0 arrays for 1 rewards"),
        (([1.0], [1]), {"kl": [None], "kl_coef": 1.0}, r"kl\[0\]: None"),
        (([1.0], [1]), {"kl": [[float("inf")]], "kl_coef": 1.0}, r"kl\[0\]\[0\]: inf"),
        (([1.0], [1]), {"kl": [[0.1]], "kl_coef": -1.0}, "kl_coef: -1.0; allowed are finite numbers from 0"),
        (([1.0], [1]), {"kl": [[0.1]]}, "kl, kl_coef: one without the other"),
        (([1.0], [1]), {"kl_coef": 0.1}, "kl, kl_coef: one without the other"),
        (([1.0, 2.0, 3.0], [1] * 3), {"group_size": 2}, "no whole number of groups of 2"),
    ],
)
def test_reinforce_plus_plus_names_what_does_not_fit(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        reinforce_plus_plus_advantages(*arguments, **options)


@given(TRAJECTORIES, UNIT, UNIT, GRID)
def test_gae_is_the_discounted_sum_of_errors(
    trajectory: list[tuple[float, float]], gamma: float, lam: float, last: float
) -> None:
    rewards, values = map(list, zip(*trajectory, strict=True))
    following = [*values[1:], last]
    errors = [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]
    expected = [
        sum((gamma * lam) ** step * error for step, error in enumerate(errors[t:]))
        for t in range(len(errors))
    ]
    advantages, returns = gae_advantages(rewards, values, gamma, lam, bootstrap_value=last)
    assert advantages.dtype == returns.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(returns, np.add(expected, values), rtol=1e-5, atol=1e-4)


@given(TRAJECTORIES, UNIT, GRID)
def test_gae_at_the_ends_of_lambda(trajectory: list[tuple[float, float]], gamma: float, last: float) -> None:
    rewards, values = map(list, zip(*trajectory, strict=True))
    steps = len(rewards)
    advantages, _ = gae_advantages(rewards, values, gamma, 0.0, bootstrap_value=last)
    errors = np.array(rewards) + gamma * np.array([*values[1:], last]) - np.array(values)
    np.testing.assert_allclose(advantages, errors, rtol=1e-5, atol=1e-5)
    _, returns = gae_advantages(rewards, values, gamma, 1.0, bootstrap_value=last)
    discounted = [
        sum(gamma**k * rewards[t + k] for k in range(steps - t)) + gamma ** (steps - t) * last
        for t in range(steps)
    ]
    np.testing.assert_allclose(returns, discounted, rtol=1e-5, atol=1e-4)


def test_a_trajectory_that_ended_has_nothing_after_it() -> None:
    advantages, returns = gae_advantages([0.0, 1.0], [0.5, 0.5], gamma=1.0, lam=1.0)
    assert advantages.tolist() == [0.5, 0.5] and returns.tolist() == [1.0, 1.0]
    assert [part.shape for part in gae_advantages([], [])] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], [0.0, 0.0]), {}, "values: 2 values for 1 rewards; .*bootstrap_value"),
        (([1.0], [[0.0]]), {}, r"values: an array of shape \[1, 1\]"),
        (([float("inf")], [0.0]), {}, r"rewards\[0\]: inf"),
        (([1.0], [float("nan")]), {}, r"values\[0\]: nan"),
        (([1.0], [0.0]), {"gamma": 1.1}, "gamma: 1.1; allowed are finite numbers from 0 to 1"),
        (([1.0], [0.0]), {"lam": -0.1}, "lam: -0.1"),
        (([1.0], [0.0]), {"bootstrap_value": float("nan")}, r"bootstrap_value\[0\]: nan"),
        (([1.0], [0.0]), {"bootstrap_value": None}, "bootstrap_value"),
    ],
)
def test_gae_names_what_does_not_fit(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        gae_advantages(*arguments, **options)
