"""The interface of rewards, and a uniform way to call one and report its errors."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np

from twinkle.protocol.errors import InvalidRequest

# Numpy's numbers are not Python's, and comparing arrays gives np.bool. Python's bool is an int.
_NUMBERS: tuple[type, ...] = (int, float, np.bool_, np.integer, np.floating)

# Rewards become float32; comparing with these bounds also excludes NaN.
_LARGEST = float(np.finfo(np.float32).max)


class Reward(Protocol):
    """Any function, or object with `__call__`, of a completion and its row."""

    def __call__(self, completion: str, row: Mapping[str, Any], /) -> float:
        """Return how good the completion is.

        Args:
            completion: the sampled text.
            row: the dataset row of its prompt, with any columns that the reward needs.
        """
        ...


def score(reward: Reward, completion: str, row: Mapping[str, Any]) -> float:
    """The reward of one completion.

    Raises:
        InvalidRequest: naming the reward, if it raises or does not return a finite real number.
    """
    name = reward_name(reward)
    try:
        value = cast(object, reward(completion, row))
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error.message}") from error
    except Exception as error:  # a user's function may raise anything, and the user needs to know where
        raise InvalidRequest(
            f"{name} raised {type(error).__name__}: {error}; a reward returns a number for every text that a model "
            "may write, such as 0.0 for one that it can't read"
        ) from error
    if isinstance(value, _NUMBERS) and -_LARGEST <= (number := cast(float, value)) <= _LARGEST:
        return float(number)
    raise InvalidRequest(f"{name} returned {str(value)[:60]!r}; a reward returns a finite number, or a bool")


def reward_name(reward: Reward) -> str:
    """A reward's name for error messages: a function's name, or an object's class."""
    return getattr(reward, "__name__", type(reward).__name__)
