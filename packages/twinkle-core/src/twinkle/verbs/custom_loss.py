"""Custom losses: run here on log-probabilities from the server, or traced and run by the server.

A function of torch tensors is differentiated, or traced, by torch, which is imported only for that, since the client
does without it. A `ClosedFormLoss` has its own gradient and needs only numpy.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode
from twinkle.protocol.types import Datum, ForwardBackwardOutput, TensorData

ClientLoss: TypeAlias = Callable[[Sequence[Datum], list[Any]], tuple[Any, Mapping[str, float]]]
"""Datums and the log-probabilities of each (torch tensors of the targets' shape) to a scalar tensor and metrics."""

Rank: TypeAlias = Literal[0, 1, 2]

Float64Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LossValue:
    """A loss evaluated at one point.

    Attributes:
        loss: its value.
        gradients: the derivative with respect to each datum's log-probabilities, float64, same shapes.
        metrics: `name:reduction` -> value.
    """

    loss: float
    gradients: list[Float64Array]
    metrics: dict[str, float]


@dataclass(frozen=True)
class ClosedFormLoss:
    """A loss of log-probabilities that knows its own gradient: `forward_backward_custom` runs it without torch.

    Called as a function it is a `ClientLoss` of torch tensors, as Tinker's SDK expects, with the same value and
    gradient.

    Attributes:
        name: for error messages.
        evaluate: from datums and their log-probabilities (float64 [T_i] each) to value, gradients and metrics.
    """

    name: str
    evaluate: Callable[[Sequence[Datum], list[Float64Array]], LossValue]

    def __call__(self, data: Sequence[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        """The same for torch tensors: (scalar tensor, metrics)."""
        torch = torch_of(f"calling {self.name} with tensors")
        value = self.evaluate(data, [tensor.detach().double().cpu().numpy() for tensor in logprobs])
        gradients = [
            torch.as_tensor(gradient).to(tensor)
            for gradient, tensor in zip(value.gradients, logprobs, strict=True)
        ]
        # Linear in the log-probabilities, with the right gradient, and shifted to the right value.
        terms = [(gradient * tensor).sum() for gradient, tensor in zip(gradients, logprobs, strict=True)]
        linear = torch.stack(terms).sum()
        return linear - linear.detach() + value.loss, value.metrics


@dataclass(frozen=True)
class LossHandle:
    """A loss that the server runs. Created by `ServiceClient.create_custom_loss`, for clients of the same session.

    Attributes:
        name: the function's name.
        loss_id: the server's name for it.
    """

    name: str
    loss_id: str


def torch_of(purpose: str) -> Any:
    """The torch module.

    Raises:
        InvalidRequest: if it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InvalidRequest(f"{purpose} needs torch on this machine: pip install torch") from error


# ---------------------------------------------------------------- run here


@dataclass(frozen=True)
class Surrogate:
    """A stand-in for a custom loss on the server: cross_entropy with weights that give the same gradient.

    Attributes:
        data: the datums with those weights, -d loss / d logprobs.
        loss: the custom loss itself.
        metrics: the function's, as given.
    """

    data: list[Datum]
    loss: float
    metrics: dict[str, float]


def without_gradient(data: Sequence[Datum]) -> list[Datum]:
    """The datums with zero weights, for the pass that only computes log-probabilities."""
    return _weighted(data, [0.0 * _targets(datum, i).array for i, datum in enumerate(data)])


def differentiate(
    loss_fn: ClientLoss | ClosedFormLoss, data: Sequence[Datum], forward: ForwardBackwardOutput
) -> Surrogate:
    """Run the loss on log-probabilities from the server and differentiate it.

    Raises:
        InvalidRequest: if a function does not return a scalar that depends on every datum's log-probabilities.
    """
    if isinstance(loss_fn, ClosedFormLoss):
        arrays = [output["logprobs"].to_numpy().astype(np.float64) for output in forward.loss_fn_outputs]
        value = loss_fn.evaluate(data, arrays)
        return Surrogate(
            _weighted(data, [-gradient for gradient in value.gradients]), value.loss, value.metrics
        )
    return _differentiate_by_torch(loss_fn, data, forward)


def _differentiate_by_torch(
    loss_fn: ClientLoss, data: Sequence[Datum], forward: ForwardBackwardOutput
) -> Surrogate:
    torch = torch_of("forward_backward_custom")
    logprobs = [
        torch.tensor(output["logprobs"].array, requires_grad=True) for output in forward.loss_fn_outputs
    ]
    returned = cast(Any, loss_fn(data, logprobs))
    if not isinstance(returned, tuple) or len(cast(Sequence[Any], returned)) != 2:
        kind = type(cast(object, returned)).__name__
        raise InvalidRequest(f"loss_fn: must return (loss, metrics), not {kind}")
    loss, metrics = cast("tuple[Any, Mapping[str, float]]", returned)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise InvalidRequest(
            "loss_fn: must return (loss, metrics), where loss is a scalar tensor computed from the log-probabilities"
        )
    loss.backward()
    for i, tensor in enumerate(logprobs):
        if tensor.grad is None:
            raise InvalidRequest(f"loss_fn: its value does not depend on the log-probabilities of data[{i}]")
    weighted = _weighted(data, [-tensor.grad for tensor in logprobs])
    return Surrogate(weighted, float(loss.detach()), {name: float(value) for name, value in metrics.items()})


def _weighted(data: Sequence[Datum], weights: Sequence[object]) -> list[Datum]:
    return [
        Datum(datum.model_input, {"target_tokens": _targets(datum, i), "weights": each})
        for i, (datum, each) in enumerate(zip(data, weights, strict=True))
    ]


def with_custom_metrics(output: ForwardBackwardOutput, surrogate: Surrogate) -> ForwardBackwardOutput:
    """The surrogate's result with the custom loss's own value and metrics."""
    metrics = {**output.metrics, **surrogate.metrics, "loss:sum": surrogate.loss}
    return ForwardBackwardOutput(output.loss_fn_outputs, metrics, output.loss_fn_output_type)


def _targets(datum: Datum, i: int) -> TensorData:
    if "target_tokens" not in datum.loss_fn_inputs:
        raise InvalidRequest(f"data[{i}].loss_fn_inputs: target_tokens missing; a loss needs them")
    return datum.loss_fn_inputs["target_tokens"]


# ---------------------------------------------------------------- run by the server


def trace(
    loss_fn: Callable[..., Any], input_ranks: Mapping[str, Rank]
) -> tuple[list[CustomLossInput], CustomLossGraph]:
    """A function of one datum's `logprobs` (and of its `loss_fn_inputs`, by name) as data.

    Raises:
        InvalidRequest: if torch.fx can't trace it: it must not branch on values of tensors.
    """
    torch_of("create_custom_loss")
    fx = importlib.import_module("torch.fx")
    try:
        graph = fx.symbolic_trace(loss_fn).graph
    except Exception as error:  # the function or the tracer may raise anything
        raise InvalidRequest(f"loss_fn: torch.fx can't trace it ({error})") from error
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    if names[:1] != ["logprobs"] or set(names) != set(input_ranks):
        raise InvalidRequest(
            f"input_ranks: must give a rank for each parameter, `logprobs` first; the function takes {names}, ranks "
            f"are given for {sorted(input_ranks)}"
        )
    inputs = [CustomLossInput(name=name, rank=input_ranks[name]) for name in names]
    return inputs, CustomLossGraph(nodes=[_encode_node(node) for node in graph.nodes])


def _encode_node(node: Any) -> CustomLossNode:
    target = str(node.target)
    if node.op == "call_function":
        qualified = importlib.import_module("torch.fx.node")._get_qualified_name  # pyright: ignore
        target = str(qualified(node.target))
        if target.startswith("_operator."):
            target = target.removeprefix("_")
    return CustomLossNode(
        op=node.op,
        name=node.name,
        target=target,
        args=[_encode(value) for value in node.args],
        kwargs={name: _encode(value) for name, value in node.kwargs.items()},
    )


def _encode(value: Any) -> Any:
    """An argument as JSON; see `CustomLossNode`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_encode(item) for item in cast("list[Any]", value)]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in cast("tuple[Any, ...]", value)]}
    if isinstance(value, dict):
        return {"dict": {str(k): _encode(v) for k, v in cast("dict[Any, Any]", value).items()}}
    if isinstance(value, slice):
        parts: list[Any] = [value.start, value.stop, value.step]
        return {"slice": [_encode(part) for part in parts]}
    if value is Ellipsis:
        return {"ellipsis": True}
    kind = type(value).__name__
    if kind == "Node":
        return {"ref": value.name}
    if kind in ("dtype", "device", "layout", "memory_format"):
        return {kind: str(value).removeprefix("torch.")}
    raise InvalidRequest(f"loss_fn: passes a {kind}, which can't be sent to the server")
