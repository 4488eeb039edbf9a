"""Runs custom losses: goes through a graph's nodes and calls what their names stand for.

Before a graph runs on tensors of some shapes for the first time it runs on tensors without memory (torch's "meta"
device) of the same shapes: one that would take much memory, or doesn't fit together, is refused before it does harm.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossNode
from twinkle.server.backends.custom_loss import FUNCTIONS
from twinkle.server.backends.protocol import CustomLoss

# Values that one node may give, and all of them together, for each value of the largest input; and at least so many.
_NODE_FACTOR, _NODE_VALUES = 16, 2**20
_TOTAL_FACTOR, _TOTAL_VALUES = 256, 2**24

_MAX_REMEMBERED = 256

Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...], str], ...]
Inputs: TypeAlias = Mapping[str, Tensor]

_checked: OrderedDict[tuple[str, Shapes], None] = OrderedDict()


def run(loss: CustomLoss, logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """A custom loss of one row.

    Args:
        logprobs: float32, [T] or [T, K].
        inputs: the other inputs by name, float32 or int64.

    Returns:
        The loss, a float32 scalar with a graph, and its metrics, detached float32 scalars.

    Raises:
        InvalidRequest: naming the node that can't be computed.
    """
    values = {**inputs, "logprobs": logprobs}
    shapes = tuple((wanted.name, *_signature(values[wanted.name])) for wanted in loss.inputs)
    if (loss.loss_id, shapes) not in _checked:
        _rehearse(loss, values)
        _checked[loss.loss_id, shapes] = None
        if len(_checked) > _MAX_REMEMBERED:
            _checked.popitem(last=False)
    return _run(loss, values, budget=None)


def _signature(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _rehearse(loss: CustomLoss, values: Inputs) -> None:
    largest = max(value.numel() for value in values.values())
    budget = _Budget(
        per_node=max(_NODE_VALUES, _NODE_FACTOR * largest), left=max(_TOTAL_VALUES, _TOTAL_FACTOR * largest)
    )
    empty = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in values.items()
    }
    with torch.enable_grad():
        value, _ = _run(loss, {**empty, "logprobs": empty["logprobs"].requires_grad_()}, budget)
    if not value.requires_grad:
        raise InvalidRequest(f"custom loss {loss.name!r}: its value does not depend on logprobs")


class _Budget:
    """How many values the nodes of a graph may still give."""

    def __init__(self, per_node: int, left: int) -> None:
        self._per_node = per_node
        self._left = left

    def spend(self, value: object) -> None:
        if isinstance(value, tuple | list):
            for item in cast("list[object]", value):
                self.spend(item)
        elif isinstance(value, Tensor):
            self._left -= value.numel()
            if value.numel() > self._per_node or self._left < 0:
                raise _Refused(f"its result of shape {list(value.shape)} is too large")


class _Refused(Exception):
    """Why a node is not computed."""


def _run(loss: CustomLoss, inputs: Inputs, budget: _Budget | None) -> tuple[Tensor, dict[str, Tensor]]:
    device = inputs["logprobs"].device
    known: dict[str, Any] = {}
    for node in loss.graph.nodes:
        if node.op == "placeholder":
            known[node.name] = inputs[node.target]
            continue
        if node.op == "output":
            return _output(loss, _decode(node.args[0], known, device))
        try:
            value = _call(node, known, device)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise _Refused("its result is too large an integer")
            if budget is not None:
                budget.spend(value)
        except (
            _Refused,
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            ArithmeticError,
            NotImplementedError,
            AttributeError,
            AssertionError,
            KeyError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InvalidRequest(
                f"custom loss {loss.name!r}: node {node.name} ({node.target}) can't be computed: {error}"
            ) from error
        known[node.name] = value
    raise AssertionError("checked graphs end in an output")


def _output(loss: CustomLoss, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    value, metrics = output
    for name, scalar in (("loss", value), *cast("dict[str, Any]", metrics).items()):
        if not isinstance(scalar, Tensor) or scalar.ndim != 0 or scalar.is_complex():
            shape = list(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            raise InvalidRequest(
                f"custom loss {loss.name!r}: its {name} must be a scalar tensor, but is of shape {shape}"
            )
    return value.float(), {name: metric.detach().float() for name, metric in metrics.items()}


# ---------------------------------------------------------------- nodes


def _call(node: CustomLossNode, known: Mapping[str, Any], device: torch.device) -> Any:
    args = [_decode(value, known, device) for value in node.args]
    kwargs = {name: _decode(value, known, device) for name, value in node.kwargs.items()}
    if node.op == "call_method":
        if not args or not isinstance(args[0], Tensor):
            raise _Refused("it is a method of tensors, and was called on something else")
        if node.target == "masked_select":
            return _masked_select(*args, **kwargs)
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.target == "getattr":
        if not isinstance(args[0], Tensor):
            raise _Refused("it reads an attribute of something that is no tensor")
        return getattr(args[0], args[1])
    return _TABLE[node.target](*args, **kwargs)


def _decode(value: Any, known: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(item, known, device) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = cast("dict[str, Any]", value).items()
    match kind:
        case "ref":
            return known[content]
        case "tuple":
            return tuple(_decode(item, known, device) for item in content)
        case "slice":
            return slice(*(_decode(item, known, device) for item in content))
        case "dict":
            return {name: _decode(item, known, device) for name, item in content.items()}
        case "ellipsis":
            return ...
        case "float":
            return float(content)
        case "device":
            return device  # wherever the client had it
        case _:  # a dtype, a layout, a memory format
            return getattr(torch, content)


# ---------------------------------------------------------------- functions that need care


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on tensors and numbers alone: lists and texts can be multiplied too."""

    def call(*args: Any) -> Any:
        if any(not isinstance(arg, Tensor | int | float | bool) for arg in args):
            raise _Refused("it takes tensors and numbers")
        return function(*args)

    return call


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        return float(base) ** exponent  # as integers it could fill the memory
    return operator.pow(base, exponent)


def _getitem(container: Any, index: Any) -> Any:
    if not isinstance(container, Tensor):
        return container[index]
    if container.is_meta and isinstance(index, Tensor) and index.dtype == torch.bool:
        return _masked_select(container, index, rows=True)
    return container[index]


def _masked_select(tensor: Tensor, mask: Tensor, rows: bool = False) -> Tensor:
    """Without memory it isn't known how many values a mask leaves: then all of them."""
    if not tensor.is_meta:
        return tensor[mask] if rows else torch.masked_select(tensor, mask)
    if rows:
        if mask.shape != tensor.shape[: mask.ndim]:
            raise _Refused(f"a mask of shape {list(mask.shape)} does not fit {list(tensor.shape)}")
        return tensor.flatten(0, mask.ndim - 1).clone() if mask.ndim else tensor.unsqueeze(0)
    return (tensor * mask).flatten()


def _lookup(name: str) -> Callable[..., Any]:
    special: dict[str, Callable[..., Any]] = {
        "abs": _number(abs),
        "getattr": getattr,
        "operator.getitem": _getitem,
        "operator.pow": _number(_power),
        "torch.masked_select": _masked_select,
    }
    if name in special:
        return special[name]
    module, _, function = name.rpartition(".")
    if module == "operator":
        return _number(getattr(operator, function))
    if module == "math":
        return _number(getattr(math, function))
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


_TABLE: dict[str, Callable[..., Any]] = {name: _lookup(name) for name in sorted(FUNCTIONS)}
