"""Rows as tensors and back: padded inputs, the rows' losses, each row's result. How a pass computes log-probabilities
in between is its own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from twinkle.protocol.types import Array
from twinkle.server.backends.lora.losses import custom_eval
from twinkle.server.backends.lora.losses.formulas import LOSS_SPECS
from twinkle.server.backends.lora.losses.functions import LOSSES
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.backends.protocol import TARGETS, CustomLoss, Row, RowResult

Metrics: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class RowLosses:
    """
    Attributes:
        values: float32 [rows], each row's loss, with a graph.
        metrics: by row, further scalars by `name:reduction`, detached.
    """

    values: Tensor
    metrics: list[Metrics]

    def to_minimise(self, rows: Sequence[Row]) -> Tensor:
        """The sum over the rows that are trained on, a scalar; 0 if there are none."""
        trained = [i for i, row in enumerate(rows) if not row.forward_only]
        return self.values.sum() if len(trained) == len(rows) else _picked(self.values, trained).sum()


def row_losses(rows: Sequence[Row], logprobs: Tensor) -> RowLosses:
    """Each row's loss; `logprobs` is [rows, tokens, k]. Rows with the same loss and parameters are computed at once."""
    groups: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        alike = i if row.custom_loss is not None else (row.loss_fn, *sorted(row.loss_config.items()))
        groups.setdefault(alike, []).append(i)
    if len(groups) == 1 and rows[0].custom_loss is None:
        return RowLosses(_losses_alike(rows, logprobs), [{} for _ in rows])
    values: list[Tensor] = []
    metrics: list[Metrics] = [{} for _ in rows]
    for members in groups.values():
        first = rows[members[0]]
        if first.custom_loss is not None:
            value, metrics[members[0]] = _custom_loss(first, first.custom_loss, logprobs[members[0]])
            values.append(value.reshape(1))
        else:
            values.append(_losses_alike([rows[i] for i in members], _picked(logprobs, members)))
    place = {i: k for k, i in enumerate(i for members in groups.values() for i in members)}
    return RowLosses(_picked(torch.cat(values), [place[i] for i in range(len(rows))]), metrics)


def _picked(tensor: Tensor, rows: list[int]) -> Tensor:
    return tensor.index_select(0, to_device(torch.tensor(rows, dtype=torch.int64), tensor.device))


def _losses_alike(rows: Sequence[Row], logprobs: Tensor) -> Tensor:
    """float32 [rows], for rows with one loss and one set of parameters."""
    first, device = rows[0], logprobs.device
    spec = LOSS_SPECS[first.loss_fn]
    tokens, k = logprobs.shape[1:]
    inputs = {
        name: padded([row.loss_inputs[name] for row in rows], np.float32, device, (tokens, k))
        for name in spec.inputs
    }
    terms = LOSSES[first.loss_fn](logprobs, inputs, {**spec.config, **first.loss_config})
    shapes = [row.loss_inputs[TARGETS].shape for row in rows]
    if any(shape != (tokens, k) and shape != (tokens,) for shape in shapes):
        own = padded([np.ones(shape, np.float32) for shape in shapes], np.float32, device, (tokens, k))
        terms = terms * own
    return terms.sum(dim=(1, 2))


def _custom_loss(row: Row, loss: CustomLoss, logprobs: Tensor) -> tuple[Tensor, Metrics]:
    """`logprobs` is the row's, [tokens, k]."""
    inputs: dict[str, Tensor] = {}
    for wanted in loss.inputs[1:]:
        array = row.loss_inputs[wanted.name]
        own = torch.tensor(array.reshape(()) if wanted.rank == 0 else array)
        inputs[wanted.name] = to_device(own, logprobs.device)
    return custom_eval.run(loss, _own_part(logprobs, row.loss_inputs[TARGETS].shape), inputs)


def _own_part(padded_row: Any, shape: tuple[int, ...]) -> Any:
    """A row's own part, [T] or [T, K], of [tokens, k]."""
    own = padded_row[: shape[0]]
    return own[:, 0] if len(shape) == 1 else own[:, : shape[1]]


def padded(
    arrays: Sequence[Array],
    dtype: type[np.float32] | type[np.int64],
    device: torch.device,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """[T_i] or [T_i, K_i] each to [rows, *size], zeros at the right; `size` is (longest, widest) unless given."""
    if size is None:
        size = max(len(array) for array in arrays), max(_width(array) for array in arrays)
    filled = np.zeros((len(arrays), *size), dtype)
    for row, array in zip(filled, arrays, strict=True):
        row[: len(array), : _width(array)] = array if array.ndim == 2 else array[:, None]
    return to_device(torch.from_numpy(filled), device)


def _width(array: Array) -> int:
    return 1 if array.ndim == 1 else array.shape[1]


def row_results(rows: Sequence[Row], logprobs: Tensor, losses: RowLosses) -> list[RowResult]:
    """The rows' results, on the host; `logprobs` is [rows, tokens, k]."""
    scalars = [scalar.detach().view(1) for metrics in losses.metrics for scalar in metrics.values()]
    # One transfer for all.
    together = torch.cat((logprobs.detach().flatten(), losses.values.detach(), *scalars)).cpu()
    host_logprobs = together[: logprobs.numel()].view(logprobs.shape).numpy()
    numbers = cast("list[float]", together[logprobs.numel() :].tolist())
    of_metrics = iter(numbers[len(rows) :])
    results: list[RowResult] = []
    for i, (row, metrics) in enumerate(zip(rows, losses.metrics, strict=True)):
        own = _own_part(host_logprobs[i], row.loss_inputs[TARGETS].shape)
        results.append(RowResult(own.copy(), numbers[i], {name: next(of_metrics) for name in metrics}))
    return results
