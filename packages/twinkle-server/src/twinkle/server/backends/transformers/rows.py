"""Rows as tensors and back: padded inputs, each row's loss, each row's result. What a pass computes between them is its
own business.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from twinkle.protocol.types import Array
from twinkle.server.backends.loss_formulas import LOSS_SPECS
from twinkle.server.backends.protocol import TARGETS, CustomLoss, Row, RowResult
from twinkle.server.backends.transformers import custom_loss
from twinkle.server.backends.transformers.losses import LOSSES, Loss


def row_losses(rows: list[Row], logprobs: Tensor) -> list[Loss]:
    """Each row's loss; `logprobs` is [rows, tokens, k]."""
    names = {name for row in rows if row.custom_loss is None for name in LOSS_SPECS[row.loss_fn].inputs}
    empty = np.zeros(0, np.float32)
    together = {
        name: padded([row.loss_inputs.get(name, empty) for row in rows], np.float32, logprobs.device)
        for name in sorted(names)
    }
    losses: list[Loss] = []
    for i, (row, row_logprobs) in enumerate(zip(rows, logprobs.unbind(0), strict=True)):
        shape = row.loss_inputs[TARGETS].shape
        own_logprobs = own_part(row_logprobs, shape)
        if row.custom_loss is not None:
            losses.append(_custom_loss(row, row.custom_loss, own_logprobs))
            continue
        spec = LOSS_SPECS[row.loss_fn]
        inputs = {name: own_part(together[name][i], shape) for name in spec.inputs}
        losses.append(LOSSES[row.loss_fn](own_logprobs, inputs, {**spec.config, **row.loss_config}))
    return losses


def _custom_loss(row: Row, loss: CustomLoss, logprobs: Tensor) -> Loss:
    inputs: dict[str, Tensor] = {}
    for wanted in loss.inputs[1:]:
        array = row.loss_inputs[wanted.name]
        inputs[wanted.name] = torch.tensor(
            array.reshape(()) if wanted.rank == 0 else array, device=logprobs.device
        )
    return Loss(*custom_loss.run(loss, logprobs, inputs))


def own_part(padded_row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A row's own part, [T] or [T, K], of [tokens, k]."""
    own = padded_row[: shape[0]]
    return own[:, 0] if len(shape) == 1 else own[:, : shape[1]]


def padded(arrays: list[Array], dtype: type[np.float32] | type[np.int64], device: torch.device) -> Tensor:
    """[T_i] or [T_i, K_i] each to [rows, longest, widest], zeros at the right."""
    matrices = [array.reshape(len(array), -1) if array.size else array.reshape(0, 1) for array in arrays]
    shape = (len(arrays), max(len(m) for m in matrices), max(m.shape[1] for m in matrices))
    filled = np.zeros(shape, dtype)
    for row, matrix in zip(filled, matrices, strict=True):
        row[: len(matrix), : matrix.shape[1]] = matrix
    return torch.from_numpy(filled).to(device)


def row_results(rows: list[Row], logprobs: Tensor, losses: list[Loss]) -> list[RowResult]:
    """What is told of the rows, on the host; `logprobs` is [rows, tokens, k]."""
    host_logprobs = logprobs.detach().cpu()
    scalars = [scalar.detach() for loss in losses for scalar in (loss.value, *loss.metrics.values())]
    numbers = iter(cast("list[float]", torch.stack(scalars).tolist()))  # one transfer for all of them
    results: list[RowResult] = []
    for row, row_logprobs, loss in zip(rows, host_logprobs, losses, strict=True):
        value = next(numbers)
        metrics = {name: next(numbers) for name in loss.metrics}
        own = own_part(row_logprobs, row.loss_inputs[TARGETS].shape)
        results.append(RowResult(own.numpy().copy(), value, metrics))
    return results
