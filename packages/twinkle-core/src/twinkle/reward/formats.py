"""Rewards for the form of a completion, whatever it says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinkle.protocol.errors import InvalidRequest

# Any text without a tag of thinking in it.
_PLAIN = r"(?:(?!</?think>).)*"


@dataclass(frozen=True)
class FormatReward:
    r"""1.0 where a regular expression matches the whole completion, else 0.0.

    Attributes:
        pattern: as Python's `re` reads it; `.` also matches line breaks. Start and end need no anchors.

    Raises:
        InvalidRequest: if the pattern is no regular expression.
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
    """One `<think>...</think>`, then an answer that is not empty, and nothing else.

    Args:
        opened_in_prompt: the prompt itself ends with `<think>`, as some models' templates have it, so that completions
            begin inside.
    """
    opening = "" if opened_in_prompt else r"\s*<think>"
    return FormatReward(rf"{opening}{_PLAIN}</think>\s*(?!</?think>)\S{_PLAIN}")


def boxed_format() -> FormatReward:
    r"""An answer in `\boxed{...}`, not empty, somewhere in the completion."""
    return FormatReward(r".*\\boxed\{\s*[^\s}].*\}.*")
