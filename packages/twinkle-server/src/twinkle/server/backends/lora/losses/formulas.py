"""What each loss reads, the check of a row for it, and the losses in numpy with closed-form gradients: the fake backend
computes with these, and every other backend is compared with them. Formulas and sources are in `functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.protocol import TARGETS, LossSpec, Row

Floats: TypeAlias = npt.NDArray[np.float64]
Inputs: TypeAlias = Mapping[str, npt.NDArray[Any]]
Config: TypeAlias = Mapping[str, float]

Formula: TypeAlias = Callable[[Floats, Inputs, Config], tuple[float, Floats]]
"""Log-probabilities, inputs and parameters to the loss and its gradient with respect to the log-probabilities."""


def _cross_entropy(logprobs: Floats, inputs: Inputs, _config: Config) -> tuple[float, Floats]:
    weights = inputs["weights"].astype(np.float64)
    return -float((weights * logprobs).sum()), -weights


def _importance_sampling(logprobs: Floats, inputs: Inputs, _config: Config) -> tuple[float, Floats]:
    terms = np.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]
    return -float(terms.sum()), -terms


def _clipped(ratio: Floats, inputs: Inputs, config: Config) -> tuple[float, Floats]:
    """The derivative of a ratio is the ratio itself; it is 0 where the clipped term is the smaller one."""
    advantages = inputs["advantages"]
    bounded = np.clip(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    is_plain = ratio * advantages <= bounded * advantages
    value = np.where(is_plain, ratio, bounded) * advantages
    return -float(value.sum()), -np.where(is_plain, ratio * advantages, 0.0)


def _ppo(logprobs: Floats, inputs: Inputs, config: Config) -> tuple[float, Floats]:
    return _clipped(np.exp(logprobs - inputs["logprobs"]), inputs, config)


def _cispo(logprobs: Floats, inputs: Inputs, config: Config) -> tuple[float, Floats]:
    ratio = np.exp(logprobs - inputs["logprobs"])
    weights = np.clip(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    weights = weights * inputs["advantages"]
    return -float((weights * logprobs).sum()), -weights


def _dro(logprobs: Floats, inputs: Inputs, config: Config) -> tuple[float, Floats]:
    distance, advantages = logprobs - inputs["logprobs"], inputs["advantages"]
    value = logprobs * advantages - 0.5 * config["beta"] * distance**2
    return -float(value.sum()), -(advantages - config["beta"] * distance)


def _gspo(logprobs: Floats, inputs: Inputs, config: Config) -> tuple[float, Floats]:
    marked = inputs["sequence_ratio_mask"] != 0
    ratio = np.exp((logprobs - inputs["logprobs"])[marked].mean()) if marked.any() else 1.0
    return _clipped(np.full_like(logprobs, ratio), inputs, config)


FORMULAS: dict[str, Formula] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
}


_SAMPLED = ("logprobs", "advantages")


def _thresholds(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


# Default thresholds of ppo and cispo are Tinker's, those of gspo are from its paper (section 5.1).
LOSS_SPECS: dict[str, LossSpec] = {
    "cross_entropy": LossSpec(("weights",), max_rank=2),
    "importance_sampling": LossSpec(_SAMPLED),
    "ppo": LossSpec(_SAMPLED, config=_thresholds(0.8, 1.2)),
    "cispo": LossSpec(_SAMPLED, config=_thresholds(0.0, 4.0)),
    "dro": LossSpec(_SAMPLED, config={"beta": 0.05}),
    "gspo": LossSpec((*_SAMPLED, "sequence_ratio_mask"), config=_thresholds(1 - 3e-4, 1 + 4e-4)),
}


def check_row(row: Row, vocab_size: int) -> None:
    """Check that a row can be computed: every backend checks all rows before it begins a pass.

    Raises:
        InvalidRequest: naming what is not possible.
    """
    if row.custom_loss is not None:
        needed: tuple[str, ...] = ()
    elif row.loss_fn in LOSS_SPECS:
        needed = LOSS_SPECS[row.loss_fn].inputs
    else:
        raise InvalidRequest(
            f"loss_fn: {row.loss_fn!r} is not known here; use one of {', '.join(sorted(LOSS_SPECS))}"
        )
    targets = row.loss_inputs.get(TARGETS)
    if targets is None or targets.ndim not in (1, 2) or len(targets) != len(row.tokens):
        raise InvalidRequest(
            f"loss_fn_inputs.{TARGETS}: must be there, [T] or [T, K] for the {len(row.tokens)} tokens"
        )
    for name in needed:
        if name not in row.loss_inputs or row.loss_inputs[name].shape != targets.shape:
            raise InvalidRequest(
                f"loss_fn_inputs.{name}: {row.loss_fn} needs it in the shape of {TARGETS}, "
                f"{list(targets.shape)}"
            )
    # On a GPU an index out of bounds would end the process.
    for name, tokens in (("model_input", row.tokens), (TARGETS, targets)):
        if tokens.size == 0 or np.min(tokens) < 0 or np.max(tokens) >= vocab_size:
            raise InvalidRequest(
                f"{name}: token ids must be between 0 and {vocab_size - 1}, at least one of them"
            )
