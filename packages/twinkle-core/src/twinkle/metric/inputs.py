"""Log-probabilities, weights and masks of either SDK as flat float64 arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from twinkle.arrays import BoolArray, Float64Array, as_mask, finite_array
from twinkle.data_format import to_datum
from twinkle.protocol.errors import InvalidRequest


class TrainingOutput(Protocol):
    """The result of `forward_backward`, in either SDK."""

    @property
    def loss_fn_outputs(self) -> Sequence[Mapping[str, Any]]: ...


class TrainingDatum(Protocol):
    @property
    def loss_fn_inputs(self) -> Mapping[str, Any]: ...


def logprobs_and_weights(
    output: TrainingOutput, data: Sequence[TrainingDatum | Mapping[str, Any]]
) -> tuple[Float64Array, Float64Array]:
    """The log-probability and the weight of each target token of a batch, float64 [sum of T_i] each.

    Raises:
        InvalidRequest: naming a datum that lacks one of them, or whose numbers of both differ.
    """
    if len(output.loss_fn_outputs) != len(data):
        raise InvalidRequest(
            f"data: {len(data)} datums for {len(output.loss_fn_outputs)} outputs; give the data that the output "
            "came from"
        )
    logprobs: list[Float64Array] = [np.zeros(0)]
    weights: list[Float64Array] = [np.zeros(0)]
    for i, (given, datum) in enumerate(zip(output.loss_fn_outputs, data, strict=True)):
        inputs = to_datum(datum).loss_fn_inputs if isinstance(datum, Mapping) else datum.loss_fn_inputs
        logprobs.append(_tensor(f"output.loss_fn_outputs[{i}]", given, "logprobs"))
        weights.append(_tensor(f"data[{i}].loss_fn_inputs", inputs, "weights"))
        if len(logprobs[-1]) != len(weights[-1]):
            raise InvalidRequest(
                f"data[{i}]: {len(weights[-1])} weights for {len(logprobs[-1])} log-probabilities; give the data that "
                "the output came from"
            )
    return np.concatenate(logprobs), np.concatenate(weights)


def selected(
    name: str, sequences: Sequence[object], mask: Sequence[object] | None
) -> tuple[Float64Array, list[int]]:
    """The entries of all sequences where the mask is true (default: all), and their number in each sequence.

    Raises:
        InvalidRequest: naming a sequence that is None, is not finite, or differs in length from its mask; or if nothing
            is left.
    """
    if mask is not None and len(mask) != len(sequences):
        raise InvalidRequest(
            f"mask: {len(mask)} masks for {len(sequences)} sequences; there must be one for each"
        )
    parts: list[Float64Array] = [np.zeros(0)]
    lengths: list[int] = []
    for i, sequence in enumerate(sequences):
        keep = None if mask is None else as_mask(f"mask[{i}]", mask[i], "[T]")
        values = _logprobs(f"{name}[{i}]", sequence, keep)
        lengths.append(len(values) if keep is None else len(keep))
        parts.append(values)
    together = np.concatenate(parts)
    if not together.size:
        raise InvalidRequest(f"{name}: no token to average over; give at least one that the mask leaves in")
    return together, lengths


def _logprobs(name: str, sequence: object, keep: BoolArray | None) -> Float64Array:
    if sequence is None:
        raise InvalidRequest(
            f"{name}: None; ask for log-probabilities when you sample, or leave the sequence out"
        )
    if keep is None or not isinstance(sequence, Sequence | np.ndarray):
        values = finite_array(name, sequence, "[T]")
    else:
        # Masked entries may be anything, such as the None of a prompt's first token.
        entries = cast(Sequence[object], sequence)
        if len(entries) == len(keep):
            entries = [entry if kept else 0.0 for entry, kept in zip(entries, keep, strict=True)]
        values = finite_array(name, entries, "[T]")
    if keep is None:
        return values
    if len(keep) != len(values):
        raise InvalidRequest(
            f"{name}: {len(values)} entries, and its mask has {len(keep)}; there must be one for each"
        )
    return values[keep]


def _tensor(name: str, tensors: Mapping[str, Any], key: str) -> Float64Array:
    if key not in tensors:
        raise InvalidRequest(
            f"{name}: no {key!r} (it has: {', '.join(tensors) or 'nothing'}); give cross_entropy's data and its output"
        )
    tensor = tensors[key]
    array: Any = tensor.to_numpy() if hasattr(tensor, "to_numpy") else tensor
    return np.asarray(array, np.float64).ravel()
