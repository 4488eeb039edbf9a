"""Rewards for the form of a completion, regardless of its content."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinkle.protocol.errors import InvalidRequest

# Any text without a thinking tag.
_PLAIN = r"(?:(?!</?think>).)*"


@dataclass(frozen=True)
class FormatReward:
    r"""1.0 if a regular expression matches the whole completion, else 0.0.

    Attributes:
        pattern: for Python's `re`; `.` also matches line breaks. Anchors are not needed.

    Raises:
        InvalidRequest: if the pattern is not a regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(f"pattern: {self.pattern!r}; expected a regular expression as text")
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise InvalidRequest(
                f"pattern: {self.pattern!r} is no regular expression: {error}; expected text such as r'Answer: .+'"
            ) from error

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        return float(re.fullmatch(self.pattern, completion, re.DOTALL) is not None)


def thinking_format(opened_in_prompt: bool = False) -> FormatReward:
    """One `<think>...</think>`, then a nonempty answer, and nothing else.

    Args:
        opened_in_prompt: the prompt itself ends with `<think>`, as in some models' templates, so that completions begin
            inside.
    """
    opening = "" if opened_in_prompt else r"\s*<think>"
    return FormatReward(rf"{opening}{_PLAIN}</think>\s*(?!</?think>)\S{_PLAIN}")


def boxed_format() -> FormatReward:
    r"""A nonempty answer in `\boxed{...}` anywhere in the completion."""
    return FormatReward(r".*\\boxed\{\s*[^\s}].*\}.*")
