"""Rewards of a group become advantages within it."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.advantage import grpo_advantages, rloo_advantages
from twinkle.protocol.errors import InvalidRequest

# Rewards on a grid: what differs at all differs by more than a rounding error.
GRID = st.integers(-40, 40).map(lambda n: n / 8)
GROUPS = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(
    lambda shape: st.lists(
        st.lists(GRID, min_size=shape[1], max_size=shape[1]), min_size=1, max_size=shape[0]
    )
)


def looped(rewards: list[list[float]], scale: str, eps: float) -> list[list[float]]:
    """GRPO's formula with Python's numbers alone."""
    everything = [reward for group in rewards for reward in group]

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5

    result = []
    for group in rewards:
        mean = sum(group) / len(group)
        divisor = {"group": deviation(group) + eps, "batch": deviation(everything) + eps, "none": 1.0}[scale]
        result.append([(reward - mean) / divisor for reward in group])
    return result


@given(GROUPS, st.sampled_from(["group", "batch", "none"]))
def test_grpo_is_its_formula(rewards: list[list[float]], scale: Any) -> None:
    advantages = grpo_advantages(rewards, scale, eps=1e-3)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, looped(rewards, scale, 1e-3), rtol=1e-5, atol=1e-6)


@given(GROUPS, st.sampled_from(["group", "batch", "none"]))
def test_grpo_sums_to_zero_in_each_group(rewards: list[list[float]], scale: Any) -> None:
    np.testing.assert_allclose(grpo_advantages(rewards, scale).sum(axis=1), 0, atol=1e-4)


@given(GROUPS, GRID)
def test_grpo_does_not_depend_on_a_shift_of_a_group(rewards: list[list[float]], shift: float) -> None:
    shifted = [[reward + shift for reward in group] for group in rewards]
    for scale in ("group", "none"):
        np.testing.assert_allclose(
            grpo_advantages(shifted, scale), grpo_advantages(rewards, scale), rtol=1e-5, atol=1e-5
        )


@given(GROUPS, st.sampled_from([0.25, 3.0, 1000.0]))
def test_grpo_by_deviation_does_not_depend_on_the_scale_of_rewards(
    rewards: list[list[float]], factor: float
) -> None:
    scaled = (np.array(rewards) * factor).tolist()
    for scale in ("group", "batch"):
        np.testing.assert_allclose(
            grpo_advantages(scaled, scale, eps=0),
            grpo_advantages(rewards, scale, eps=0),
            rtol=1e-5,
            atol=1e-6,
        )
    np.testing.assert_allclose(
        grpo_advantages(scaled, "none"), factor * grpo_advantages(rewards, "none"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_equal_rewards_give_exact_zeros(scale: Any, eps: float) -> None:
    # The mean of three times 0.1 is not 0.1.
    advantages = grpo_advantages([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]], scale, eps)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert (grpo_advantages([[0.1] * 3] * 2, scale, eps) == 0).all()
    assert (rloo_advantages([[0.1, 0.1, 0.1]]) == 0).all()


def test_half_right_is_plus_and_minus_one() -> None:
    assert grpo_advantages([[1, 0, 1, 0]], eps=0).tolist() == [[1.0, -1.0, 1.0, -1.0]]
    assert grpo_advantages([[True, False]], scale="none").tolist() == [[0.5, -0.5]]


@given(GROUPS)
def test_rloo_is_the_reward_less_the_mean_of_the_others(rewards: list[list[float]]) -> None:
    expected = [
        [reward - sum(group[:g] + group[g + 1 :]) / (len(group) - 1) for g, reward in enumerate(group)]
        for group in rewards
    ]
    advantages = rloo_advantages(rewards)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    groups = np.array(rewards)
    size = groups.shape[1]
    centred = size / (size - 1) * (groups - groups.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(advantages, centred, rtol=1e-5, atol=1e-5)


@given(GROUPS)
def test_flat_rewards_go_group_after_group(rewards: list[list[float]]) -> None:
    flat = [reward for group in rewards for reward in group]
    for advantages in (grpo_advantages, rloo_advantages):
        np.testing.assert_array_equal(advantages(flat, group_size=len(rewards[0])), advantages(rewards))


def test_no_prompts_are_no_advantages() -> None:
    assert grpo_advantages(np.zeros((0, 4))).shape == (0, 4)
    assert rloo_advantages([], group_size=4).shape == (0, 4)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([[1.0], [0.0]], {}, "rewards: groups of 1; .*group_size .num_samples. >= 2"),
        ([1.0, 0.0], {"group_size": 1}, "rewards: groups of 1; .*group_size .num_samples. >= 2"),
        ([1.0] * 5, {"group_size": 2}, "rewards: 5 rewards are no whole number of groups of 2"),
        ([1.0] * 4, {"group_size": 0}, "group_size: 0; allowed are whole numbers from 1"),
        ([1.0, 0.0], {}, r"rewards: an array of shape \[2\]; expected \[P, G\]"),
        ([[1.0, 0.0]], {"group_size": 2}, r"rewards: an array of shape \[1, 2\]; expected \[N\]"),
        ([[1.0, 0.0], [1.0]], {}, "rewards: row 1 holds 1 entries and row 0 holds 2"),
        ([[1.0, 0.0], [float("nan"), 1.0]], {}, r"rewards\[1\]\[0\]: nan; only finite numbers"),
        ([[1.0, float("inf")]], {}, r"rewards\[0\]\[1\]: inf"),
        ([[1.0, None]], {}, r"rewards: rewards\[0\]\[1\] is NoneType"),
        ([["a", "b"]], {}, "rewards: values of type <U1"),
        (None, {}, "rewards: None"),
    ],
)
def test_rewards_that_form_no_groups_are_refused(rewards: Any, options: dict[str, Any], message: str) -> None:
    for advantages in (grpo_advantages, rloo_advantages):
        with pytest.raises(InvalidRequest, match=message):
            advantages(rewards, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "std"}, "scale: 'std'; allowed are 'group', 'batch' and 'none'"),
        ({"eps": -1.0}, "eps: -1.0; allowed are finite numbers from 0"),
        ({"eps": float("nan")}, "eps: nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        grpo_advantages([[0.0, 1.0]], **options)
