"""How good a completion is, as a number.

A reward is any function of a completion and its dataset row (`Reward`). `mathematics` compares answers by way of
`math_processes` (whose processes run `math_worker`), `formats` looks at the form, `combined` adds rewards up, and
`grading` calls them for whole batches. What becomes of the numbers is the business of `twinkle.advantage`.
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
