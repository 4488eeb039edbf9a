"""Marks that datasets put on a message to say whether it is trained on: OpenAI's `weight`, and others' like it."""

from collections.abc import Mapping
from typing import Any, Final

from twinkle.protocol.errors import InvalidRequest

MARKS: Final = ("weight", "loss", "trainable", "train", "loss_scale", "loss_weight")
"""What such a key is called; it holds 0 or false for a message that is not trained on."""


def is_left_out(message: Mapping[str, Any], where: str) -> bool:
    """Whether a message is marked as not to be trained on.

    Args:
        where: the message's place, for errors.

    Raises:
        InvalidRequest: if a mark is neither yes nor no, such as a weight of 0.5; or if marks contradict each other.
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
