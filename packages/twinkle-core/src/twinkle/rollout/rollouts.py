"""A rollout: a prompt and what came of it, token by token, and how it becomes training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinkle.data_format import Message, Types, make_datum
from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest

# What each loss reads beside tokens, log-probabilities and advantages.
_LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt, and what was said after it by the model and by others.

    Attributes:
        tokens: the whole text, int64 [T]. What the model sampled is in it as it was sampled.
        is_sampled: which of them the model sampled, bool [T].
        logprobs: of the sampled tokens, as the sampler gave them; 0 elsewhere; float32 [T].
        messages: the same as a conversation.
        completion: the text of the model's last turn, without what ends it.
        stop_reason: of the last turn: "stop", or "length" if it was cut off.
        num_turns: how often the model spoke.
        problems: what could not be read in its turns, such as a tool call that is no JSON.
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
        """How many tokens the model sampled."""
        return int(self.is_sampled.sum())

    @property
    def sampled_logprobs(self) -> npt.NDArray[np.float32]:
        """Of the sampled tokens alone, float32 [num_sampled]."""
        return self.logprobs[self.is_sampled]


def to_training_data(
    rollouts: Sequence[Rollout] | Sequence[Sequence[Rollout]],
    advantages: npt.ArrayLike | Sequence[npt.ArrayLike],
    loss_fn: str = "importance_sampling",
    types: Types = core_types,
) -> list[Any]:
    """The datums for a loss over what the model sampled. Rollouts whose advantages are all 0 teach nothing: left out.

    Args:
        rollouts: a list of them, or of groups.
        advantages: one for each rollout, [N] or [groups, group size]; or for each rollout its tokens' own, float
            [num_sampled].
        loss_fn: importance_sampling, ppo, cispo, dro or gspo.
        types: the client's.

    Returns:
        Datums of `model_input` [T - 1] and, for each position, what `loss_fn` reads: `target_tokens`, `logprobs`,
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
    """What belongs to each rollout: a number, or an array over its sampled tokens."""
    if isinstance(advantages, np.ndarray) or not isinstance(advantages, Sequence):
        values = [np.asarray(each, np.float64) for each in np.asarray(advantages, np.float64).ravel()]
    else:
        values = [np.asarray(each, np.float64) for each in advantages]
        if len(values) != count and all(each.ndim == 1 for each in values):  # groups of numbers
            values = [np.asarray(number, np.float64) for each in values for number in each]
    if len(values) != count:
        raise InvalidRequest(f"advantages: {len(values)} for {count} rollouts; there must be one for each")
    return values
