"""Evaluates custom losses: goes through a graph's nodes and calls what their names stand for.

Before a graph runs on inputs of new shapes it has a dry run on meta tensors (shapes without memory): one that would
take much memory or work, or whose shapes don't fit, is refused before it does harm. If a mask picks values, only
running it tells how many: such a graph has its dry run node by node, as it runs.
"""

from __future__ import annotations

import inspect
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossNode
from twinkle.server.backends.lora.losses.custom_check import DEVICE, FUNCTIONS, METHODS
from twinkle.server.backends.protocol import CustomLoss

# How many values one node may give, and all of them together may read and give: per value of the largest input, and
# at least.
_NODE_FACTOR, _NODE_VALUES = 16, 2**20
_TOTAL_FACTOR, _TOTAL_VALUES = 256, 2**24
# A tensor's fixed cost, in values.
_TENSOR_VALUES = 256

_MAX_DIMENSIONS = 16
_MAX_PIECES = 1024
_MAX_DIFFERENCES = 8
_MAX_SHIFTS = 2
_MAX_REMEMBERED = 4096

Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...], str], ...]
Inputs: TypeAlias = Mapping[str, Tensor]
Result: TypeAlias = tuple[Tensor, dict[str, Tensor]]

# Whether a mask picks values, for losses and shapes that had their dry run. Networks of one pass run in threads.
_dry_runs: OrderedDict[tuple[str, Shapes], bool] = OrderedDict()
_dry_runs_lock = threading.Lock()


def run(loss: CustomLoss, logprobs: Tensor, inputs: Inputs) -> Result:
    """A custom loss of one row.

    The gradient is computed at once, so that the graph's tensors are freed before the next row's, and anything not
    differentiable fails here.

    Args:
        logprobs: float32, [T] or [T, K].
        inputs: the other inputs by name, float32 or int64.

    Returns:
        The loss, a float32 scalar that can be differentiated once by `logprobs`, and its metrics, detached float32
        scalars.

    Raises:
        InvalidRequest: naming the node that can't be computed.
    """
    values = {**inputs, "logprobs": logprobs}
    step = _node_by_node(values) if _dry_run_once(loss, values) else _Call.run
    if not (torch.is_grad_enabled() and logprobs.requires_grad):
        return _evaluate(loss, values, step)
    leaf = logprobs.detach().requires_grad_()
    value, metrics = _evaluate(loss, {**values, "logprobs": leaf}, step)
    try:
        [gradient] = torch.autograd.grad(value, leaf)
    except _AT_FAULT as error:
        raise _refusal(loss, "its gradient", error) from error
    return cast(Tensor, _Differentiated.apply(logprobs, value.detach(), gradient)), metrics


class _Differentiated(torch.autograd.Function):
    """A value whose gradient by `logprobs` is known."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        _, value, gradient = args
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = ctx.saved_tensors
        return grad_outputs[0] * gradient, None, None


# ---------------------------------------------------------------- dry runs


def _dry_run_once(loss: CustomLoss, values: Inputs) -> bool:
    """Dry-run a loss unless it has had one with these shapes. Returns whether a mask picks values in it."""
    key = loss.loss_id, tuple((wanted.name, *_signature(values[wanted.name])) for wanted in loss.inputs)
    with _dry_runs_lock:
        if key in _dry_runs:
            _dry_runs.move_to_end(key)
            return _dry_runs[key]
    budget = _Budget(values)
    empty = {name: _on_meta(value) for name, value in values.items()}
    with torch.enable_grad():
        value, _ = _evaluate(loss, {**empty, "logprobs": empty["logprobs"].requires_grad_()}, budget.run)
    if not value.requires_grad:
        raise InvalidRequest(
            f"custom loss {loss.name!r}: its value does not depend on logprobs in a way that can be differentiated"
        )
    with _dry_runs_lock:
        _dry_runs[key] = budget.picked
        if len(_dry_runs) > _MAX_REMEMBERED:
            _dry_runs.popitem(last=False)
    return budget.picked


def _signature(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _node_by_node(values: Inputs) -> Callable[[_Call], Any]:
    """Dry-run each node just before running it."""
    budget = _Budget(values)

    def step(call: _Call) -> Any:
        with torch.no_grad():
            budget.run(_Call(call.function, _on_meta(call.args), _on_meta(call.kwargs)))
        return call.run()

    return step


class _Budget:
    """What a graph's nodes may still cost, counted on meta tensors.

    Attributes:
        picked: whether a mask has picked values, so that shapes from there on are only an upper bound.
    """

    def __init__(self, inputs: Inputs) -> None:
        largest = max(value.numel() for value in inputs.values())
        self._per_node = max(_NODE_VALUES, _NODE_FACTOR * largest)
        self._left = max(_TOTAL_VALUES, _TOTAL_FACTOR * largest)
        self.picked = False

    def run(self, call: _Call) -> Any:
        for value in (*call.args, *call.kwargs.values()):
            self._spend(value)
        value = call.run()
        self._spend(value)
        self.picked = self.picked or call.function is _masked_select or call.picks_by_mask()
        return value

    def _spend(self, value: object) -> None:
        if isinstance(value, tuple | list):
            for item in cast("list[object]", value):
                self._spend(item)
        elif isinstance(value, Tensor):
            self._left -= value.numel() + _TENSOR_VALUES
            if value.numel() > self._per_node or value.ndim > _MAX_DIMENSIONS:
                raise _Refused(f"a result of shape {list(value.shape)[:_MAX_DIMENSIONS]} is too large")
            if self._left < 0:
                raise _Refused("all nodes up to here together compute too much")


def _on_meta(value: Any) -> Any:
    """The same with meta tensors of the same shapes and strides."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {name: _on_meta(item) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return cast(Any, type(value))([_on_meta(item) for item in cast("list[Any]", value)])
    return value


# ---------------------------------------------------------------- nodes


class _Refused(Exception):
    """Why a node is not computed."""


# torch 2.6 and 2.7 raise the second as a plain RuntimeError.
_SERVERS_TROUBLE = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))

# What torch and Python raise for a call that makes no sense; a client's graph may cause nothing else.
_AT_FAULT = (
    _Refused,
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def picks_by_mask(self) -> bool:
        if self.function is not _getitem or len(self.args) != 2:
            return False
        index = self.args[1] if isinstance(self.args[1], tuple) else (self.args[1],)
        return any(_is_mask(item) for item in cast("tuple[Any, ...]", index))


def _evaluate(loss: CustomLoss, inputs: Inputs, step: Callable[[_Call], Any]) -> Result:
    device = inputs["logprobs"].device
    known: dict[str, Any] = {}
    for node in loss.graph.nodes:
        if node.op == "placeholder":
            known[node.name] = inputs[node.target]
            continue
        if node.op == "output":
            return _output(loss, _decode(node.args[0], known, device))
        try:
            known[node.name] = _bounded(step(_call(node, known, device)))
        except _AT_FAULT as error:
            raise _refusal(loss, f"node {node.name} ({node.target})", error) from error
    raise AssertionError("checked graphs end in an output")


def _refusal(loss: CustomLoss, what: str, error: Exception) -> InvalidRequest:
    if isinstance(error, _SERVERS_TROUBLE):
        raise error
    first_line = str(error).partition("\n")[0][:300]
    return InvalidRequest(f"custom loss {loss.name!r}: {what} can't be computed: {first_line}")


def _bounded(value: Any) -> Any:
    if isinstance(value, complex):
        raise _Refused("its result is no real number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _Refused("its result is too large an integer")
    return value


def _output(loss: CustomLoss, output: Any) -> Result:
    value, metrics = output
    for name, scalar in (("loss", value), *cast("dict[str, Any]", metrics).items()):
        if not isinstance(scalar, Tensor) or scalar.ndim != 0 or scalar.is_complex():
            found = f"of shape {list(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            raise InvalidRequest(
                f"custom loss {loss.name!r}: its {name} must be a real scalar tensor, but is {found}; reduce it, "
                "with .sum() or .mean()"
            )
    return value.float(), {name: metric.detach().float() for name, metric in metrics.items()}


def _call(node: CustomLossNode, known: Mapping[str, Any], device: torch.device) -> _Call:
    args = [_decode(value, known, device) for value in node.args]
    kwargs = {name: _decode(value, known, device) for name, value in node.kwargs.items()}
    if node.op == "call_function":
        return _Call(_FUNCTIONS[node.target], args, kwargs)
    if not args or not isinstance(args[0], Tensor):
        raise _Refused("it is a method of tensors, and was called on something else")
    return _Call(_METHODS[node.target], args, kwargs)


def _decode(value: Any, known: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(item, known, device) for item in cast("list[Any]", value)]
    if isinstance(value, str) and DEVICE.fullmatch(value):
        return device  # whatever the client's was
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
            return device
        case _:  # a dtype, a layout, a memory format
            return getattr(torch, content)


# ---------------------------------------------------------------- functions that need care: of Python


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on tensors and numbers alone: lists and strings could be multiplied too."""

    def call(*args: Any) -> Any:
        if any(not isinstance(arg, Tensor | int | float) for arg in args):
            raise _Refused("it takes tensors and numbers")
        return function(*args)

    return call


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if any(not isinstance(arg, int | float) for arg in args):
            raise _Refused("it takes numbers; for tensors there is a function of torch of the same name")
        return function(*args)

    return call


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        return float(base) ** exponent  # integers could fill the memory
    return operator.pow(base, exponent)


def _attribute(value: Any, name: str) -> Any:
    if name in ("values", "indices"):
        if not (isinstance(value, tuple) and type(value).__module__ == "torch.return_types"):
            raise _Refused(f"only what max, min, sort, topk and the like return with a dim has {name!r}")
    elif not isinstance(value, Tensor):
        raise _Refused("it reads an attribute of something that is no tensor")
    return getattr(value, name)


# ---------------------------------------------------------------- functions that need care: of tensors


def _is_mask(item: object) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _getitem(container: Any, index: Any) -> Any:
    if isinstance(container, tuple | list):
        return cast("tuple[Any, ...]", container)[index]
    if not isinstance(container, Tensor):
        raise _Refused("it takes an item of a tensor or of a tuple")
    items = cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index,)
    wide = [item.ndim if _is_mask(item) else int(item is not None and item is not ...) for item in items]
    plain: list[Any] = []
    dim = 0
    for i, (item, width) in enumerate(zip(items, wide, strict=True)):
        if item is ...:
            dim = container.ndim - sum(wide[i + 1 :])
            plain.append(item)
            continue
        plain += _plain_index(item, container.shape[dim : dim + width], container.device)
        dim += width
    return container[tuple(plain)]


def _plain_index(item: Any, sizes: torch.Size, device: torch.device) -> list[Any]:
    """An index as torch takes it; `sizes` are those of the indexed dimensions.

    A GPU that reads beyond a tensor's end is lost for everyone, so indices are checked first.
    """
    if isinstance(item, list):
        if not all(isinstance(place, int) for place in cast("list[Any]", item)):
            raise _Refused("a list as an index holds integers")
        item = torch.tensor(item, dtype=torch.int64, device=device)
    if not isinstance(item, Tensor):
        if isinstance(item, bool):
            raise _Refused("True and False are no index")
        return [item]
    if item.dtype == torch.bool:
        if item.ndim == 0 or item.shape != sizes:
            raise _Refused(f"a mask of shape {list(item.shape)} does not fit {list(sizes)}")
        return _places(item)
    if item.dtype not in (torch.int64, torch.int32):
        raise _Refused(f"a tensor as an index is of int64, int32 or bool, not {item.dtype}")
    if len(sizes) != 1:
        raise _Refused("there are more indices than dimensions")
    _check_places(item, -sizes[0], sizes[0])
    return [item]


def _places(mask: Tensor) -> list[Tensor]:
    """Where a mask is true, by dimension; on meta tensors that isn't known: then everywhere."""
    if mask.is_meta:
        return list(torch.empty((mask.ndim, mask.numel()), dtype=torch.int64, device="meta").unbind(0))
    return list(mask.nonzero(as_tuple=True))


def _check_places(index: Tensor, lowest: int, end: int) -> None:
    if not index.is_meta and bool(((index < lowest) | (index >= end)).any()):
        raise _Refused(f"an index is out of range; here {lowest} to {end - 1} are allowed")


def _masked_select(input: Tensor, mask: Tensor) -> Tensor:
    if input.is_meta:
        return (input * mask).flatten()
    return torch.masked_select(input, mask)


def _gather(input: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    if sparse_grad:
        raise _Refused("sparse_grad must be False")
    _check_places(index, 0, input.shape[dim] if input.ndim else 1)
    return torch.gather(input, dim, index)


def _index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    _check_places(index, 0, input.shape[dim] if input.ndim else 1)
    return torch.index_select(input, dim, index)


def _divide(input: Tensor, other: Tensor | float, *, rounding_mode: str | None = None) -> Tensor:
    # The least integer divided by -1 with truncation is a processor fault that ends the process.
    if rounding_mode == "trunc" and not any(_is_floating(value) for value in (input, other)):
        raise _Refused("rounding_mode='trunc' takes floating numbers; convert with .float()")
    return torch.div(input, other, rounding_mode=rounding_mode)


def _is_floating(value: object) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)


def _view(self: Tensor, *shape: Any) -> Tensor:
    # In another dtype the same memory may not be a valid value.
    if any(isinstance(size, torch.dtype) for size in shape):
        raise _Refused("view takes a shape; to convert to another dtype there is .to()")
    return self.view(*shape)


def _diff(input: Tensor, n: int = 1, dim: int = -1, *args: Tensor, **kwargs: Tensor) -> Tensor:
    if not 0 <= n <= _MAX_DIFFERENCES:
        raise _Refused(f"n must be 0 to {_MAX_DIFFERENCES}")
    return torch.diff(input, n, dim, *args, **kwargs)


def _quantile(input: Tensor, q: float, *args: Any, **kwargs: Any) -> Tensor:
    if not isinstance(cast(object, q), float | int):
        raise _Refused("q must be one number")  # a GPU doesn't check that a tensor is between 0 and 1
    return torch.quantile(input, q, *args, **kwargs)


def _roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    if isinstance(shifts, tuple | list) and len(cast("list[Any]", shifts)) > _MAX_SHIFTS:
        raise _Refused(f"there can be at most {_MAX_SHIFTS} shifts")
    return torch.roll(input, shifts, () if dims is None else dims)


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    _check_pieces(min(chunks, input.shape[dim]))
    return torch.chunk(input, chunks, dim)


def _unbind(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    _check_pieces(input.shape[dim])
    return torch.unbind(input, dim)


def _split(tensor: Tensor, split_size: Any, dim: int = 0) -> tuple[Tensor, ...]:
    if isinstance(split_size, int):
        _check_pieces(tensor.shape[dim] // max(split_size, 1))
    return torch.split(tensor, split_size, dim)


def _check_pieces(pieces: int) -> None:
    if pieces > _MAX_PIECES:
        raise _Refused(f"it would give {pieces} tensors; at most {_MAX_PIECES} are allowed")


def _binary_cross_entropy(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Values outside [0, 1] make a GPU unusable for everyone.
    if not input.is_meta and not bool(((input >= 0) & (input <= 1)).all()):
        raise _Refused("all elements of its input must be between 0 and 1")
    return torch.nn.functional.binary_cross_entropy(input, *args, **kwargs)


def _not_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        if signature.bind(*args, **kwargs).arguments.get("inplace"):
            raise _Refused("nothing is done in place in a custom loss")
        return function(*args, **kwargs)

    return call


# ---------------------------------------------------------------- the tables

# Functions of torch and tensor methods that are not called directly.
_CAREFUL: dict[str, Callable[..., Any]] = {
    "chunk": _chunk,
    "diff": _diff,
    "div": _divide,
    "divide": _divide,
    "gather": _gather,
    "index_select": _index_select,
    "masked_select": _masked_select,
    "quantile": _quantile,
    "roll": _roll,
    "split": _split,
    "unbind": _unbind,
}


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    match module, function:
        case "", "abs":
            return _operator(abs)
        case "", "getattr":
            return _attribute
        case "operator", "getitem":
            return _getitem
        case "operator", "pow":
            return _operator(_power)
        case "operator", _:
            return _operator(getattr(operator, function))
        case "math", _:
            return _of_numbers(getattr(math, function))
        case (("torch" | "torch.functional"), _) if function in _CAREFUL:
            return _CAREFUL[function]
        case "torch.nn.functional", "binary_cross_entropy":
            return _binary_cross_entropy
        case _:
            return _of_torch(name)


def _of_torch(name: str) -> Callable[..., Any]:
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    takes_inplace = inspect.isfunction(found) and "inplace" in inspect.signature(found).parameters
    return _not_in_place(found) if takes_inplace else found


def _method(name: str) -> Callable[..., Any]:
    if name == "view":
        return _view
    return _CAREFUL[name] if name in _CAREFUL else getattr(Tensor, name)


_FUNCTIONS: dict[str, Callable[..., Any]] = {name: _function(name) for name in sorted(FUNCTIONS)}
_METHODS: dict[str, Callable[..., Any]] = {name: _method(name) for name in sorted(METHODS)}
