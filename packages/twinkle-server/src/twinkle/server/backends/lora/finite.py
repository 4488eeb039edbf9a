"""Numbers that are not finite: which optimizer steps and states are refused for them, and in which words. No torch.

A run whose weights or moments are once infinite (or not numbers) stays so for ever, so that no step may make them so,
and no state that has them is saved or taken over. A gradient may be anything until a step wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array
from twinkle.server.backends.protocol import AdapterState

LARGEST_GRADIENT = 1e18
"""Most that an element of a gradient may be, after clipping: AdamW keeps its square, which is to be a float32."""


LARGEST_MEAN = 2 * LARGEST_GRADIENT
"""Most that AdamW's first moment may be: a mean of such gradients, with room for rounding."""


class Fault(IntEnum):
    """Why a step is refused. Of several ranks the largest counts."""

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
    """What is said of a step that was not made.

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
        is_saved: whether the state comes from elsewhere, or is one that is to be saved; for the words only.

    Raises:
        InvalidRequest: if a weight or a moment is not finite, or no moment of AdamW's, naming the matrix.
    """
    whose = "the saved adapter's" if is_saved else "this run's"
    _check_range(f"weights: {whose}", state.weights, -np.inf, np.inf)
    if state.optimizer is not None:
        # Of what a mean of gradients can be, and one of their squares: beyond that the next step would not be finite.
        _check_range(f"optimizer exp_avg: {whose}", state.optimizer.exp_avg, -LARGEST_MEAN, LARGEST_MEAN)
        _check_range(f"optimizer exp_avg_sq: {whose}", state.optimizer.exp_avg_sq, 0.0, np.inf)


def _check_range(what: str, arrays: Mapping[str, Array], least: float, most: float) -> None:
    for name, array in arrays.items():
        if array.size == 0:
            continue
        # Either is NaN where one element is.
        for value in (float(array.min()), float(array.max())):
            if not (np.isfinite(value) and least <= value <= most):
                raise InvalidRequest(
                    f"{what} {name} holds {value:g}, with which nothing can be computed: its training has failed; go "
                    "back to a checkpoint from before"
                )
