"""Rewards for the form of a completion."""

from typing import Any

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.reward import FormatReward, boxed_format, thinking_format


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Answer: 7", 1.0),
        ("Answer: 7\nand more", 1.0),
        ("The answer: 7", 0.0),
        ("Answer: ", 0.0),
    ],
)
def test_the_pattern_must_match_the_whole(completion: str, expected: float) -> None:
    assert FormatReward(r"Answer: .+")(completion, {}) == expected


@pytest.mark.parametrize("pattern", ["(", "[a", "*", None, b"a"])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(InvalidRequest, match="pattern: "):
        FormatReward(pattern)("a", {})


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>\nHm.\n</think>\nSeven.\n", 1.0),
        ("  <think></think>7", 1.0),
        ("<think>a < b</think> 3 > 2", 1.0),
        ("<think>Hm.</think>", 0.0),
        ("<think>Hm.</think> \n ", 0.0),
        ("Well, <think>Hm.</think>7", 0.0),
        ("<think>Hm.7", 0.0),
        ("Hm.</think>7", 0.0),
        ("7", 0.0),
        ("", 0.0),
        ("<think>Hm.</think>7<think>Or?</think>8", 0.0),
        ("<think>a<think>b</think>7", 0.0),
        ("<think>a</think></think>7", 0.0),
        ("<think>a</think>" + "7 " * 50_000 + "<think>", 0.0),
    ],
)
def test_one_thought_then_an_answer(completion: str, expected: float) -> None:
    assert thinking_format()(completion, {}) == expected


def test_the_thought_may_have_begun_in_the_prompt() -> None:
    reward = thinking_format(opened_in_prompt=True)
    assert reward("Hm.\n</think>\n7", {}) == 1.0
    assert reward("<think>Hm.</think>7", {}) == 0.0
    assert reward("7", {}) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"So it is \boxed{7}.", 1.0),
        ("First\n\\boxed{\\frac{1}{2}}\n", 1.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{7", 0.0),
        ("7", 0.0),
    ],
)
def test_a_box_with_something_in_it(completion: str, expected: float) -> None:
    assert boxed_format()(completion, {}) == expected
