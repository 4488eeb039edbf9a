"""Several rewards as one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from twinkle.protocol.errors import InvalidRequest
from twinkle.reward.base import Reward, score


@dataclass(frozen=True)
class WeightedSum:
    """The sum of weight * reward. Created by `combine`.

    Attributes:
        parts: rewards and their weights.
    """

    parts: tuple[tuple[Reward, float], ...]

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """
        Raises:
            InvalidRequest: naming the part that raises, or does not return a finite number.
        """
        return sum(weight * score(reward, completion, row) for reward, weight in self.parts)


def combine(weights: Mapping[Reward, float] | Iterable[tuple[Reward, float]]) -> WeightedSum:
    """Combine several rewards: `combine([(MathReward(), 1.0), (thinking_format(), 0.2)])`.

    Args:
        weights: reward -> weight, or pairs of both. Negative weights are penalties.

    Raises:
        InvalidRequest: if there is none, or one is not a function.
    """
    pairs = cast(Mapping[Reward, float], weights).items() if isinstance(weights, Mapping) else weights
    parts = tuple(pairs)
    if not parts:
        raise InvalidRequest("weights: no reward; give at least one, as (reward, weight)")
    for i, (reward, _) in enumerate(parts):
        if not callable(reward):
            raise InvalidRequest(
                f"weights: entry {i} is {type(reward).__name__}, no function of (completion, row); give pairs "
                "(reward, weight), the reward first"
            )
    return WeightedSum(parts)
