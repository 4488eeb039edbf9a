"""Two parts of training loops: gradient accumulation over several batches, and the loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from twinkle.data_format import to_datum
from twinkle.dataloader.loader import Rows
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Datum, ForwardBackwardOutput
from twinkle.verbs.training import Batch, TrainingClient, join_outputs

T = TypeVar("T")

# A bar that appears for a moment would only be noise.
_PROGRESS_DELAY_SECONDS = 2.0


@dataclass(frozen=True)
class Evaluation:
    """How well a run does on held-out data.

    Attributes:
        nll: mean negative log-likelihood of the labelled tokens, in nats.
        tokens: number of those tokens.
        sequences: number of rows.
    """

    nll: float
    tokens: int
    sequences: int

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def evaluate(
    training_client: TrainingClient, rows: Rows[Mapping[str, Any]], batch_size: int = 16
) -> Evaluation:
    """Forward passes over encoded rows; neither weights nor gradients change.

    Args:
        training_client: the run, as it is after all steps submitted so far.
        rows: features, such as an encoded `Dataset`.
        batch_size: rows per request.

    Raises:
        InvalidRequest: if there are no rows, or no row has a token to predict.
    """
    data = [_datum(rows[i], i) for i in range(len(rows))]
    if not data:
        raise InvalidRequest("rows: there are none; an evaluation needs at least one")
    weight = sum(_total_weight(datum) for datum in data)
    if weight <= 0:
        raise InvalidRequest(
            "rows: no label marks a token, so there is no loss; see train_on of the template"
        )
    # All are submitted at once; the client limits how many are in flight.
    passes = [training_client.forward(data[i : i + batch_size]) for i in range(0, len(data), batch_size)]
    loss = 0.0
    for each in tqdm(passes, desc="evaluating", unit="batch", delay=_PROGRESS_DELAY_SECONDS, leave=False):
        loss += each.result().metrics["loss:sum"]
    tokens = sum(int((datum.loss_fn_inputs["weights"].array != 0).sum()) for datum in data)
    return Evaluation(loss / weight, tokens, len(data))


def accumulate(
    training_client: TrainingClient, batches: Iterable[Batch], loss_fn: str = "cross_entropy"
) -> ForwardBackwardOutput:
    """Add the gradient of the mean loss over the tokens of several batches, as one large batch would.

    Weights are divided by their sum over all batches, so the step does not grow with the number of tokens.

    Args:
        batches: arguments of `forward_backward`, one after the other; follow with an optimizer step.
        loss_fn: cross_entropy. (Other losses sum over tokens: call `forward_backward` several times.)

    Returns:
        The outputs, as of one batch; `loss:sum` is the mean loss, in nats per token.

    Raises:
        InvalidRequest: if there is no batch, or no token to train on.
    """
    if loss_fn != "cross_entropy":
        raise InvalidRequest(f"loss_fn: {loss_fn!r} has no weights to divide; use cross_entropy")
    groups = list(batches)
    for i, batch in enumerate(groups):
        if isinstance(batch, Mapping | Datum):
            raise InvalidRequest(
                f"batches[{i}]: one row; give a list of batches: [batch], or grouped(batch, size)"
            )
    data = [[_datum(row, i) for i, row in enumerate(batch)] for batch in groups]
    total = sum(_total_weight(datum) for batch in data for datum in batch)
    if total <= 0:
        raise InvalidRequest("batches: no token is trained on (all labels are -100, or there is no batch)")
    passes = [training_client.forward_backward([_scaled(datum, total) for datum in batch]) for batch in data]
    return join_outputs([each.result() for each in passes])


def grouped(items: Iterable[T], size: int) -> Iterable[list[T]]:
    """Consecutive lists of `size` items, the last one possibly shorter: batches for `accumulate`.

    Raises:
        InvalidRequest: if the size is below 1.
    """
    if size < 1:
        raise InvalidRequest(f"size: {size}; allowed are whole numbers from 1")
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _datum(row: Datum | Mapping[str, Any], i: int) -> Datum:
    if isinstance(row, Datum):
        return row
    try:
        return to_datum(row)
    except InvalidRequest as error:
        raise InvalidRequest(f"rows[{i}]: {error.message}") from error


def _total_weight(datum: Datum) -> float:
    return float(datum.loss_fn_inputs["weights"].array.sum())


def _scaled(datum: Datum, total: float) -> Datum:
    weights = datum.loss_fn_inputs["weights"].array / total
    return Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights})
