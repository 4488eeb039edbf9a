"""Packs the datums of many jobs into micro-batches of rows of similar length, within a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from twinkle.protocol.messages import ForwardBackwardRequest
from twinkle.protocol.metrics import reduce_metric
from twinkle.protocol.types import Datum, ForwardBackwardOutput, TensorData
from twinkle.server.backends.protocol import TARGETS, BaseModelInfo, CustomLoss, Row, RowResult
from twinkle.server.backends.shares import micro_batch_tokens
from twinkle.server.engine.cuts import ends_of
from twinkle.server.scheduling.runs import Job


@dataclass(frozen=True)
class Packed:
    """Micro-batches, and where each of their rows came from.

    Attributes:
        origins: for each micro-batch, for each row, (job's index, datum's index).
    """

    micro_batches: list[list[Row]]
    origins: list[list[tuple[int, int]]]

    def cost(self, info: BaseModelInfo) -> int:
        """Of all micro-batches, in tokens, padding included."""
        tokens = sum(micro_batch_tokens(rows, info.packs_rows) for rows in self.micro_batches)
        return tokens + len(self.micro_batches) * info.overhead_tokens


def to_row(
    run_id: str, request: ForwardBackwardRequest, datum: Datum, custom_loss: CustomLoss | None = None
) -> Row:
    """A datum as the backend takes it."""
    return Row(
        adapter_id=run_id,
        tokens=datum.model_input.tokens.astype(np.int64),
        loss_fn=request.loss_fn,
        loss_inputs={name: tensor.array for name, tensor in datum.loss_fn_inputs.items()},
        loss_config={k: v for k, v in request.loss_fn_config.items() if not isinstance(v, str)},
        forward_only=request.forward_only,
        custom_loss=custom_loss,
    )


def _width(row: Row) -> int:
    """Candidates at each position: 1 for targets [T], K for [T, K]."""
    targets = row.loss_inputs[TARGETS]
    return 1 if targets.ndim == 1 else targets.shape[1]


def pack(jobs: Sequence[Job], info: BaseModelInfo) -> Packed:
    """Pack the rows of all jobs into micro-batches of similar length; each row is padded to the longest. If the backend
    packs rows their lengths make no difference: those of an adapter stay together, so that its terms are computed in as
    few micro-batches as possible.

    Forward-only rows get micro-batches of their own, which keep nothing for a backward pass; so do rows with several
    candidates per position, by their number. The longest row of a padded micro-batch comes first, so that splitting it
    again splits it by length.

    Args:
        info: `max_batch_tokens` is exceeded only by a single row that is longer; no cut is made that saves less padding
            than `overhead_tokens`.
    """
    rows = [
        (to_row(job.run.run_id, job.request, datum, job.custom_loss), (i, j))
        for i, job in enumerate(jobs)
        if isinstance(job.request, ForwardBackwardRequest)
        for j, datum in enumerate(job.request.data)
    ]
    rows.sort(key=lambda item: (*_kind(item[0]), *_order(item[0], info), item[1]))
    groups: list[list[tuple[Row, tuple[int, int]]]] = []
    for _, alike in groupby(rows, key=lambda item: _kind(item[0])):
        together = list(alike)
        lengths = np.array([len(row.tokens) for row, _ in together])
        ends = ends_of(lengths, info)
        groups += [together[start:end] for start, end in zip([0, *ends], [*ends, len(together)], strict=True)]
    return Packed(
        micro_batches=[[row for row, _ in group] for group in groups],
        origins=[[origin for _, origin in group] for group in groups],
    )


def _kind(row: Row) -> tuple[bool, int]:
    return row.forward_only, _width(row)


def _order(row: Row, info: BaseModelInfo) -> tuple[str | int, ...]:
    length = -len(row.tokens)
    return (row.adapter_id, length) if info.packs_rows else (length, row.adapter_id)


def unpack(
    jobs: Sequence[Job], packed: Packed, results: list[list[RowResult]]
) -> list[ForwardBackwardOutput]:
    """Each job's result, with its datums in the request's order; metrics are summed over datums."""
    by_job: list[dict[int, RowResult]] = [{} for _ in jobs]
    for origins, row_results in zip(packed.origins, results, strict=True):
        for (i, j), result in zip(origins, row_results, strict=True):
            by_job[i][j] = result
    return [_output([found[j] for j in range(len(found))]) for found in by_job]


def _output(results: list[RowResult]) -> ForwardBackwardOutput:
    metrics = {"loss:sum": float(sum(result.loss for result in results))}
    for name in sorted({name for result in results for name in result.metrics}):
        values = [result.metrics[name] for result in results if name in result.metrics]
        metrics[name] = reduce_metric(name, values)
    return ForwardBackwardOutput([{"logprobs": TensorData(result.logprobs)} for result in results], metrics)
