"""Non-finite numbers: which optimizer steps and states are refused because of them, with which messages. No torch.

A run whose weights or moments become infinite (or NaN) stays so forever, so no step may make them so, and no such state
is saved or imported. A gradient may be anything until a step needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array
from twinkle.server.backends.protocol import AdapterState

LARGEST_GRADIENT = 1e18
"""Largest element of a gradient after clipping: its square, which AdamW keeps, must be a finite float32."""


LARGEST_MEAN = 2 * LARGEST_GRADIENT
"""Largest element of AdamW's first moment: a mean of such gradients, with room for rounding."""


class Fault(IntEnum):
    """Why a step is refused. If several ranks disagree, the largest counts."""

    NONE = 0
    RESULT = 1
    SQUARE = 2
    GRADIENT = 3


_WHY = {
    Fault.GRADIENT: (
        "the gradient is not finite (its norm is {norm}): in a pass since the last step a loss, a weight, an advantage "
        "or a ratio of probabilities was too large for float32. Look at the losses of those passes, and send them "
        "again with smaller weights or advantages"
    ),
    Fault.SQUARE: (
        "the gradient (its norm is {norm:.4g}) is so large that AdamW's second moment, a mean of its square, would be "
        "infinite, and the run stand still for ever. Pass grad_clip_norm, or send the passes since the last step again "
        "with smaller weights or advantages"
    ),
    Fault.RESULT: (
        "with these parameters the weights would no longer be finite. Pass a smaller learning_rate or weight_decay, or "
        "a larger eps, and send the passes since the last step again"
    ),
}


def refusal(fault: Fault, norm: float) -> InvalidRequest:
    """The error for a step that was refused.

    Args:
        norm: of the gradient, before clipping.
    """
    why = _WHY[fault].format(norm=norm)
    return InvalidRequest(
        f"optim_step: {why}. The step was not made and the gradient is dropped; weights and moments are as before"
    )


def check_finite(state: AdapterState, is_saved: bool = True) -> None:
    """
    Args:
        is_saved: whether the state is a saved one, rather than one about to be saved; only for the message.

    Raises:
        InvalidRequest: if a weight or moment is not finite, or out of range for AdamW's moments, naming the matrix.
    """
    whose = "the saved adapter's" if is_saved else "this run's"
    _check_range(f"weights: {whose}", state.weights, -np.inf, np.inf)
    if state.optimizer is not None:
        # Limits on a mean of gradients and one of their squares: beyond them the next step would not be finite.
        _check_range(f"optimizer exp_avg: {whose}", state.optimizer.exp_avg, -LARGEST_MEAN, LARGEST_MEAN)
        _check_range(f"optimizer exp_avg_sq: {whose}", state.optimizer.exp_avg_sq, 0.0, np.inf)


def _check_range(what: str, arrays: Mapping[str, Array], least: float, most: float) -> None:
    for name, array in arrays.items():
        if array.size == 0:
            continue
        # Both are NaN if any element is.
        for value in (float(array.min()), float(array.max())):
            if not (np.isfinite(value) and least <= value <= most):
                raise InvalidRequest(
                    f"{what} {name} holds {value:g}, with which nothing can be computed: its training has failed; go "
                    "back to a checkpoint from before"
                )
