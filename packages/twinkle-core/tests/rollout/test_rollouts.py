"""Rollouts as training data: what stands at which position."""

import numpy as np
import pytest
from tinker import types as tinker_types

from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout import Rollout, to_training_data


def rollout(tokens: list[int], sampled: list[int], logprobs: list[float]) -> Rollout:
    """`sampled` are positions; `logprobs` are theirs."""
    is_sampled = np.zeros(len(tokens), np.bool_)
    is_sampled[sampled] = True
    values = np.zeros(len(tokens), np.float32)
    values[sampled] = logprobs
    return Rollout(np.array(tokens), is_sampled, values, [], "", "stop")


# A prompt of two tokens, two sampled, one of a tool's, one sampled.
TURNS = rollout([5, 6, 7, 8, 9, 4], [2, 3, 5], [-0.5, -0.25, -1.0])


def test_each_position_says_how_to_learn_the_token_after_it():
    [datum] = to_training_data([TURNS], [2.0])
    inputs = {name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()}
    assert datum.model_input.to_ints() == [5, 6, 7, 8, 9]
    assert inputs == {
        "target_tokens": [6, 7, 8, 9, 4],
        "logprobs": [0.0, -0.5, -0.25, 0.0, -1.0],
        "advantages": [0.0, 2.0, 2.0, 0.0, 2.0],
    }


def test_tokens_may_have_advantages_of_their_own():
    [datum] = to_training_data([TURNS], [np.array([1.0, 2.0, 3.0])], "ppo")
    assert datum.loss_fn_inputs["advantages"].tolist() == [0.0, 1.0, 2.0, 0.0, 3.0]


def test_gspo_is_told_which_tokens_make_the_ratio():
    [datum] = to_training_data([TURNS], [-1.0], "gspo")
    assert datum.loss_fn_inputs["sequence_ratio_mask"].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_groups_are_flattened_and_what_teaches_nothing_is_left_out():
    group = [TURNS, rollout([1, 2, 3], [2], [-0.1])]
    data = to_training_data([group, group], np.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert [datum.model_input.length for datum in data] == [2, 5]
    assert to_training_data([group], [[0.0, 0.0]]) == []


def test_tinkers_types_are_filled_in_the_same_way():
    [own] = to_training_data([TURNS], [2.0], "gspo")
    [theirs] = to_training_data([TURNS], [2.0], "gspo", types=tinker_types)
    assert isinstance(theirs, tinker_types.Datum)
    assert theirs.model_input.to_ints() == own.model_input.to_ints()
    for name, tensor in theirs.loss_fn_inputs.items():
        assert tensor.dtype == own.loss_fn_inputs[name].dtype
        np.testing.assert_array_equal(tensor.to_numpy(), own.loss_fn_inputs[name].to_numpy())


@pytest.mark.parametrize(
    ("advantages", "loss_fn", "message"),
    [
        ([1.0, 2.0], "ppo", "advantages: 2 for 1 rollouts"),
        (
            [np.array([1.0, 2.0])],
            "ppo",
            r"advantages\[0\]: shape \[2\]; give one number, or one for each of the 3",
        ),
        ([float("nan")], "ppo", r"advantages\[0\]: nan; all must be finite"),
        (
            [1.0],
            "cross_entropy",
            "'cross_entropy' is no loss over samples; use one of importance_sampling, ppo",
        ),
    ],
)
def test_what_does_not_fit_is_said(advantages, loss_fn: str, message: str):
    with pytest.raises(InvalidRequest, match=message):
        to_training_data([TURNS], advantages, loss_fn)
