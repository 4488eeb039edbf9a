"""Can a row be computed? The checks that every backend makes before it begins a pass."""

from __future__ import annotations

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora.losses.formulas import LOSS_SPECS
from twinkle.server.backends.protocol import TARGETS, Row


def check_row(row: Row, vocab_size: int) -> None:
    """
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
