"""Packs the datums of many jobs into micro-batches of rows of like length, under a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twinkle.protocol.messages import ForwardBackwardRequest
from twinkle.protocol.types import Datum, ForwardBackwardOutput, TensorData
from twinkle.server.backends.protocol import TARGETS, CustomLoss, Row, RowResult
from twinkle.server.scheduling.jobs import Job


@dataclass(frozen=True)
class Packed:
    """Micro-batches, and where each of their rows came from.

    Attributes:
        origins: for each micro-batch, for each row, (job's index, datum's index).
    """

    micro_batches: list[list[Row]]
    origins: list[list[tuple[int, int]]]


def to_row(
    run_id: str, request: ForwardBackwardRequest, datum: Datum, custom_loss: CustomLoss | None = None
) -> Row:
    """One datum as the backend takes it."""
    return Row(
        adapter_id=run_id,
        tokens=datum.model_input.tokens().astype(np.int64),
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


def pack(jobs: Sequence[Job], max_batch_tokens: int) -> Packed:
    """Rows of all jobs, sorted by length and cut so that rows x longest row stays within `max_batch_tokens`.

    Forward-only rows get micro-batches of their own, which keep nothing for a backward pass; so do rows with several
    candidates at each position, by their number. Within a micro-batch rows of one adapter stand together.
    """
    rows = [
        (to_row(job.run_id, job.request, datum, job.custom_loss), (i, j))
        for i, job in enumerate(jobs)
        if isinstance(job.request, ForwardBackwardRequest)
        for j, datum in enumerate(job.request.data)
    ]
    rows.sort(key=lambda item: (item[0].forward_only, _width(item[0]), -len(item[0].tokens)))
    groups: list[list[tuple[Row, tuple[int, int]]]] = []
    for item in rows:
        if not groups or not _fits(groups[-1], item[0], max_batch_tokens):
            groups.append([])
        groups[-1].append(item)
    for group in groups:
        group.sort(key=lambda item: (item[0].adapter_id, item[1]))
    return Packed(
        micro_batches=[[row for row, _ in group] for group in groups],
        origins=[[origin for _, origin in group] for group in groups],
    )


def _fits(group: list[tuple[Row, tuple[int, int]]], row: Row, max_batch_tokens: int) -> bool:
    first = group[0][0]  # the longest, since rows come in falling length
    alike = first.forward_only == row.forward_only and _width(first) == _width(row)
    return alike and (len(group) + 1) * len(first.tokens) <= max_batch_tokens


def unpack(
    jobs: Sequence[Job], packed: Packed, results: list[list[RowResult]]
) -> list[ForwardBackwardOutput]:
    """Each job's result, its datums in the order of the request; metrics are summed over datums."""
    by_job: list[dict[int, RowResult]] = [{} for _ in jobs]
    for origins, row_results in zip(packed.origins, results, strict=True):
        for (i, j), result in zip(origins, row_results, strict=True):
            by_job[i][j] = result
    return [_output([found[j] for j in range(len(found))]) for found in by_job]


def _output(results: list[RowResult]) -> ForwardBackwardOutput:
    metrics = {"loss:sum": float(sum(result.loss for result in results))}
    for name in sorted({name for result in results for name in result.metrics}):
        metrics[name] = _reduce(name, [result.metrics[name] for result in results if name in result.metrics])
    return ForwardBackwardOutput([{"logprobs": TensorData(result.logprobs)} for result in results], metrics)


def _reduce(name: str, values: list[float]) -> float:
    """By the suffix of the metric's name, as the SDK combines chunks."""
    match name.rpartition(":")[2]:
        case "mean":
            return sum(values) / len(values)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case _:
            return float(sum(values))
