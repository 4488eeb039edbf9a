"""Whole batches are graded, and what goes wrong is said with its place."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.reward import FormatReward, MathReward, combine, grade, grade_groups


def length(completion: str, row: Mapping[str, Any]) -> float:
    return len(completion) - row.get("less", 0)


def parse_number(completion: str, row: Mapping[str, Any]) -> float:
    return int(completion)


def test_each_completion_is_graded_with_its_row() -> None:
    scores = grade(length, ["a", "bbb"], [{"less": 1}, {}])
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.0, 3.0]
    assert grade(length, [], []).shape == (0,)


def test_groups_share_a_row() -> None:
    scores = grade_groups(length, [["a", "bb"], ["ccc", ""]], [{}, {"less": 1}])
    assert scores.dtype == np.float32
    assert scores.tolist() == [[1.0, 2.0], [2.0, -1.0]]
    assert grade_groups(length, [], []).shape == (0, 0)


def test_threads_keep_the_order() -> None:
    together = threading.Barrier(3, timeout=60)

    def waits(completion: str, row: Mapping[str, Any]) -> float:
        together.wait()  # passes only if three are graded at once
        return float(completion)

    assert grade(waits, list("123456"), [{}] * 6, num_threads=3).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.int64(2), np.bool_(True)])
def test_any_real_number_is_a_reward(value: Any) -> None:
    assert grade(lambda completion, row: value, ["a"], [{}])[0] == float(value)


@pytest.mark.parametrize(
    "value", [None, "1", float("nan"), float("inf"), 1e39, 10**400, 1j, [1.0], np.zeros(1)]
)
def test_anything_else_is_refused_by_name(value: Any) -> None:
    def odd(completion: str, row: Mapping[str, Any]) -> Any:
        return value

    with pytest.raises(
        InvalidRequest, match=r"completion 0 \('a'\): odd returned .*; a reward returns a finite"
    ):
        grade(odd, ["a"], [{}])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_reward_that_raises_is_named_with_the_place(num_threads: int) -> None:
    message = r"prompt 1, sample 0 \('seven'\): parse_number raised ValueError: .*; a reward returns a number"
    with pytest.raises(InvalidRequest, match=message) as caught:
        grade_groups(parse_number, [["1", "2"], ["seven", "eight"]], [{}, {}], num_threads)
    assert isinstance(caught.value.__cause__, ValueError)


def test_long_completions_are_shown_in_part() -> None:
    with pytest.raises(InvalidRequest) as caught:
        grade(parse_number, ["x" * 10_000], [{}])
    assert f"('{'x' * 60}'...)" in caught.value.message


def test_a_combination_is_the_weighted_sum() -> None:
    reward = combine([(length, 0.5), (FormatReward("a+"), 2.0)])
    assert grade(reward, ["aa", "bb"], [{}, {}]).tolist() == [3.0, 1.0]
    assert combine({length: -1.0})("abc", {}) == -3.0


def test_a_combination_names_its_part() -> None:
    with pytest.raises(
        InvalidRequest, match=r"completion 0 \('x'\): WeightedSum: parse_number raised ValueError"
    ):
        grade(combine([(length, 1.0), (parse_number, 1.0)]), ["x"], [{}])
    with pytest.raises(InvalidRequest, match="weights: no reward"):
        combine([])
    with pytest.raises(InvalidRequest, match="weights: entry 0 is float, no function"):
        combine([(1.0, length)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grade(length, ["a"], []), "rows: 0 rows for 1 completions"),
        (lambda: grade(length, "abc", [{}] * 3), "completions: one text; expected a list"),
        (lambda: grade(length, [[1, 2]], [{}]), r"completions\[0\]: list; expected text: decode"),  # pyright: ignore
        (lambda: grade(MathReward, ["a"], [{}]), "reward: MathReward is a class; give an instance"),  # pyright: ignore
        (lambda: grade(1.0, ["a"], [{}]), "reward: float is no function"),  # pyright: ignore
        (lambda: grade(length, ["a"], [{}], num_threads=0), "num_threads: 0; at least 1"),
        (
            lambda: grade_groups(length, [["a"], ["b", "c"]], [{}, {}]),
            r"groups\[1\]: 2 completions, where groups\[0\] has 1",
        ),
        (lambda: grade_groups(length, [["a"]], [{}, {}]), "rows: 2 rows for 1 groups"),
        (lambda: grade_groups(length, ["ab"], [{}]), r"groups\[0\]: one text"),
    ],
)
def test_batches_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        call()
