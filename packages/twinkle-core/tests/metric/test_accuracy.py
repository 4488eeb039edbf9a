"""Shares of right tokens and right answers."""

import math
from typing import Any

import numpy as np
import pytest

from twinkle.metric import answer_accuracy, token_accuracy
from twinkle.protocol.errors import InvalidRequest

ROWS = [None, [(7, -0.1), (8, -3.0)], [(9, -0.5)], [(4, -0.2)]]


def test_a_token_is_right_where_it_is_the_likeliest() -> None:
    assert token_accuracy(ROWS, [1, 7, 9, 5]) == pytest.approx(2 / 3)
    assert token_accuracy(ROWS, [1, 8, 9, 5], mask=[True, True, True, False]) == pytest.approx(1 / 2)
    assert token_accuracy(ROWS, [1, 8, 9, 4], mask=np.array([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([1, 2], None, "topk_rows: 4 rows for 2 tokens"),
        ([1, 2, 3, 4], [True], "mask: 1 entries for 4 tokens"),
        ([1, 2, 3, 4], [1, 0, 0, 0], "topk_rows: no token counts"),
        ([1, 2, 3, 4], [1, 0, 2, 0], r"mask\[2\]: 2; a mask holds"),
    ],
)
def test_token_accuracy_names_what_does_not_fit(tokens: list[int], mask: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        token_accuracy(ROWS, tokens, mask)


def test_answers_reach_the_threshold() -> None:
    accuracy, error = answer_accuracy([1.0, 0.0, 1.0, 1.0])
    assert accuracy == 0.75
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert answer_accuracy(np.array([[1.2, 1.0], [0.2, 0.9]]), threshold=1.0)[0] == 0.5
    assert answer_accuracy([True, True]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "rewards: none"),
        ([1.0, float("nan")], "rewards: entry 1 is NaN"),
        ([[1.0], [1.0, 2.0]], "rewards: not a rectangular array of numbers"),
    ],
)
def test_no_answers_have_no_accuracy(rewards: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        answer_accuracy(rewards)
