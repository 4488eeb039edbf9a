"""Rewards: how good a completion is, as a number.

A reward is any function of a completion and its dataset row (`Reward`). `mathematics` compares answers in
`math_processes` (which run `math_worker`), `formats` checks the form, `combined` sums rewards, and `grading` applies
them to whole batches. `twinkle.advantage` turns rewards into advantages.
"""

from twinkle.reward.base import Reward
from twinkle.reward.combined import WeightedSum, combine
from twinkle.reward.formats import FormatReward, boxed_format, thinking_format
from twinkle.reward.grading import grade, grade_groups
from twinkle.reward.mathematics import MathReward

__all__ = [
    "FormatReward",
    "MathReward",
    "Reward",
    "WeightedSum",
    "boxed_format",
    "combine",
    "grade",
    "grade_groups",
    "thinking_format",
]
