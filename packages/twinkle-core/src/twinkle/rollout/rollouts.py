"""Rollouts, token by token, and their conversion to training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinkle.data_format import Message, Types, make_datum
from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest

# Inputs of each loss besides tokens, log-probabilities and advantages.
_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt, followed by turns of the model and others.

    Attributes:
        tokens: the whole text, int64 [T], with the model's tokens exactly as sampled.
        is_sampled: which of these the model sampled, bool [T].
        logprobs: of the sampled tokens, from the sampler; 0 elsewhere; float32 [T].
        messages: the rollout as a conversation.
        completion: the text of the model's last turn, without its end.
        stop_reason: of the last turn: "stop", or "length" if it was cut off.
        num_turns: number of model turns.
        problems: parsing problems of its turns, such as a tool call that is not JSON.
    """

    tokens: npt.NDArray[np.int64]
    is_sampled: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float32]
    messages: list[Message]
    completion: str
    stop_reason: str
    num_turns: int = 1
    problems: tuple[str, ...] = ()

    @property
    def num_sampled(self) -> int:
        return int(self.is_sampled.sum())

    @property
    def sampled_logprobs(self) -> npt.NDArray[np.float32]:
        """Log-probabilities of only the sampled tokens, float32 [num_sampled]."""
        return self.logprobs[self.is_sampled]


def to_training_data(
    rollouts: Sequence[Rollout] | Sequence[Sequence[Rollout]],
    advantages: npt.ArrayLike | Sequence[npt.ArrayLike],
    loss_fn: str = "importance_sampling",
    types: Types = core_types,
) -> list[Any]:
    """The datums for a loss over the sampled tokens. Rollouts whose advantages are all 0 have no effect and are
    dropped.

    Args:
        rollouts: a list of rollouts, or of groups of rollouts.
        advantages: one per rollout, [N] or [groups, group size]; or one per sampled token of each rollout, float
            [num_sampled].
        loss_fn: importance_sampling, ppo, cispo, dro or gspo.
        types: the client's module of types.

    Returns:
        Datums of `model_input` [T - 1] and, for each position, the inputs of `loss_fn`: `target_tokens`, `logprobs`,
        `advantages` (0 where the next token was not sampled), and for gspo `sequence_ratio_mask`.

    Raises:
        InvalidRequest: if the loss is unknown, or the advantages don't fit the rollouts or are not finite.
    """
    if loss_fn not in _LOSSES:
        raise InvalidRequest(f"loss_fn: {loss_fn!r} is no loss over samples; use one of {', '.join(_LOSSES)}")
    each = _flat(rollouts)
    given = _of_each(advantages, len(each))
    data: list[Any] = []
    for i, (rollout, values) in enumerate(zip(each, given, strict=True)):
        if values.shape not in ((), (rollout.num_sampled,)):
            raise InvalidRequest(
                f"advantages[{i}]: shape {list(values.shape)}; give one number, or one for each of the "
                f"{rollout.num_sampled} sampled tokens"
            )
        if not np.isfinite(values).all():
            raise InvalidRequest(
                f"advantages[{i}]: {values}; all must be finite (is a reward nan or infinite?)"
            )
        if rollout.num_sampled == 0 or not values.any():
            continue
        by_token = np.zeros(len(rollout.tokens), np.float32)
        by_token[rollout.is_sampled] = values
        inputs: dict[str, npt.NDArray[Any]] = {
            "target_tokens": rollout.tokens[1:],
            "logprobs": rollout.logprobs[1:],
            "advantages": by_token[1:],
        }
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = rollout.is_sampled[1:].astype(np.float32)
        data.append(make_datum(types, rollout.tokens[:-1], inputs))
    return data


def _flat(rollouts: Sequence[Rollout] | Sequence[Sequence[Rollout]]) -> list[Rollout]:
    flat: list[Rollout] = []
    for each in rollouts:
        if isinstance(each, Rollout):
            flat.append(each)
        else:
            flat.extend(each)
    return flat


def _of_each(
    advantages: npt.ArrayLike | Sequence[npt.ArrayLike], count: int
) -> list[npt.NDArray[np.float64]]:
    """The advantages of each rollout: a number, or an array over its sampled tokens."""
    if isinstance(advantages, np.ndarray) or not isinstance(advantages, Sequence):
        values = [np.asarray(each, np.float64) for each in np.asarray(advantages, np.float64).ravel()]
    else:
        values = [np.asarray(each, np.float64) for each in advantages]
        if len(values) != count and all(each.ndim == 1 for each in values):  # groups of numbers
            values = [np.asarray(number, np.float64) for each in values for number in each]
    if len(values) != count:
        raise InvalidRequest(f"advantages: {len(values)} for {count} rollouts; there must be one for each")
    return values
