"""Keys by which datasets exclude a message from training: OpenAI's `weight`, and similar ones."""

from collections.abc import Mapping
from typing import Any, Final

from twinkle.protocol.errors import InvalidRequest

MARKS: Final = ("weight", "loss", "trainable", "train", "loss_scale", "loss_weight")
"""The names of such keys; 0 or false excludes the message."""


def is_left_out(message: Mapping[str, Any], where: str) -> bool:
    """Whether a message is excluded from training.

    Args:
        where: the message's place, for errors.

    Raises:
        InvalidRequest: if a value is neither 0 nor 1, such as a weight of 0.5; or if keys contradict each other.
    """
    marked = {key: message[key] for key in MARKS if message.get(key) is not None}
    for key, value in marked.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise InvalidRequest(
                f"{where}.{key}: {value!r}; allowed are 0 or false for a message that is not trained on, 1 or true; "
                "other weights go into the feature's loss_weights, one for each token"
            )
    if len({bool(value) for value in marked.values()}) > 1:
        said = ", ".join(f"{key}={value!r}" for key, value in marked.items())
        raise InvalidRequest(f"{where}: {said} contradict each other; keep one of them")
    return any(not value for value in marked.values())
