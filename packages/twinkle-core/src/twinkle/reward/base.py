"""What a reward is, and how one is called: whatever goes wrong in somebody's function is said in one way."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np

from twinkle.protocol.errors import InvalidRequest

# Numpy's numbers are none of Python's, and what was compared in an array is a np.bool. Python's bool is an int.
_NUMBERS: tuple[type, ...] = (int, float, np.bool_, np.integer, np.floating)

# Rewards become float32; NaN is not within these bounds either.
_LARGEST = float(np.finfo(np.float32).max)


class Reward(Protocol):
    """Any function, or object with `__call__`, of a completion and its row."""

    def __call__(self, completion: str, row: Mapping[str, Any], /) -> float:
        """How good the completion is.

        Args:
            completion: the text that was sampled.
            row: the dataset row that its prompt came from, with whatever columns the reward needs.
        """
        ...


def score(reward: Reward, completion: str, row: Mapping[str, Any]) -> float:
    """The reward of one completion.

    Raises:
        InvalidRequest: naming the reward, if it raises or returns anything but a finite real number.
    """
    name = reward_name(reward)
    try:
        value = cast(object, reward(completion, row))
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error.message}") from error
    except (
        Exception
    ) as error:  # somebody's function: whatever it raises, where it happened is what one has to know
        raise InvalidRequest(
            f"{name} raised {type(error).__name__}: {error}; a reward returns a number for every text that a model "
            "may write, such as 0.0 for one that it can't read"
        ) from error
    if isinstance(value, _NUMBERS) and -_LARGEST <= (number := cast(float, value)) <= _LARGEST:
        return float(number)
    raise InvalidRequest(f"{name} returned {str(value)[:60]!r}; a reward returns a finite number, or a bool")


def reward_name(reward: Reward) -> str:
    """What messages call it: a function's name, an object's class."""
    return getattr(reward, "__name__", type(reward).__name__)
