"""Which custom losses may be run: what their graphs may name, and how they must be built. No torch.

A client traces its loss with torch.fx and sends the graph as data. It is never turned into code: a backend goes through
the nodes and calls what the names below stand for, nothing else. They don't include anything that writes in place,
draws random numbers, touches files, leaves torch, or makes a tensor from a size alone. The backend that runs a graph
decides how much it may compute, and which arguments of an allowed function are safe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, cast

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode

MAX_NODES = 1000
MAX_INPUTS = 16
_MAX_DEPTH = 8
_MAX_ITEMS = 256
_MAX_NODE_BYTES = 16_384

_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")

_OPERATORS = "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor invert getitem"

# Functions of torch, and tensor methods with the same names.
_BOTH = (
    "abs acos acosh add all amax amin any argmax argmin asin asinh atan atan2 atanh ceil chunk clamp clamp_max "
    "clamp_min clip clone cos cosh cummax cummin cumprod cumsum detach diff div divide eq erf erfc exp exp2 expm1 "
    "flatten flip float_power floor floor_divide fmod frac gather ge gt hypot index_select isfinite isinf isnan "
    "kthvalue le lerp lgamma log log10 log1p log2 log_softmax logaddexp logcumsumexp logical_and logical_not "
    "logical_or logical_xor logit logsumexp lt masked_fill masked_select max maximum mean median min minimum movedim "
    "mul multiply nan_to_num nanmean nansum narrow ne neg negative norm numel positive pow prod quantile ravel "
    "reciprocal relu remainder reshape roll round rsqrt select sigmoid sign sin sinh softmax sort split sqrt square "
    "squeeze std sub subtract sum t tan tanh topk transpose tril triu true_divide trunc unbind unflatten unsqueeze "
    "var where xlogy"
)
_TORCH_ALONE = (
    "cat concat cosine_similarity full_like hstack ones_like rsub stack std_mean var_mean vstack zeros_like"
)
_METHODS_ALONE = (
    "bfloat16 bool contiguous dim double expand expand_as float half int long permute size to type_as view "
    "view_as"
)
_FUNCTIONAL = (
    "binary_cross_entropy binary_cross_entropy_with_logits cosine_similarity elu hardtanh huber_loss "
    "kl_div l1_loss leaky_relu log_softmax logsigmoid margin_ranking_loss mse_loss normalize pad relu selu sigmoid "
    "silu smooth_l1_loss soft_margin_loss softmax softmin softplus softsign tanh"
)
# How torch.fx writes objects whose module is not the documented one: built-in functions, among others.
_ELSEWHERE = (
    "torch.functional.norm torch.functional.split torch._C._nn.softplus torch._C._nn.log_sigmoid torch._C._nn.gelu "
    "torch._C._linalg.linalg_vector_norm "
)
_SPECIAL = "entr erf erfc exp2 expit expm1 log1p log_softmax logit logsumexp softmax xlog1py xlogy"
_MATH = "ceil cos exp expm1 fabs floor log log10 log1p log2 pow sin sqrt tanh"

FUNCTIONS = frozenset(
    {
        "getattr",
        "abs",
        *(f"operator.{name}" for name in _OPERATORS.split()),
        *(f"math.{name}" for name in _MATH.split()),
        *(f"torch.{name}" for name in (*_BOTH.split(), *_TORCH_ALONE.split())),
        *(f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()),
        *(f"torch._C._special.special_{name}" for name in _SPECIAL.split()),
        *_ELSEWHERE.split(),
    }
)
METHODS = frozenset({*_BOTH.split(), *_METHODS_ALONE.split()})
# The last two are the fields of what `max(dim)`, `sort` and the like return.
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "values", "indices"})
DTYPES = frozenset(
    {"float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
)
DEVICE = re.compile(r"(cpu|cuda|mps)(:[0-9]{1,3})?")
"""The client's device, whatever it was; it stands for the one that the loss is computed on."""

# Allowed strings: ways of reducing, rounding, interpolating or padding, and norms.
_REDUCTIONS = (
    "none mean sum batchmean floor trunc linear lower higher midpoint nearest constant replicate tanh fro"
)
_TEXTS = frozenset(_REDUCTIONS.split())
# torch.fx includes these even with their default values; any other value is refused.
_KEYWORDS_REFUSED = frozenset({"out", "inplace", "generator", "requires_grad", "pin_memory", "sparse_grad"})


def check(inputs: Sequence[CustomLossInput], graph: CustomLossGraph) -> None:
    """
    Raises:
        InvalidRequest: naming the first node that is not allowed, and why.
    """
    _check_inputs(inputs)
    if not 1 <= len(graph.nodes) <= MAX_NODES:
        raise InvalidRequest(f"graph.nodes: {len(graph.nodes)} nodes; a custom loss has 1 to {MAX_NODES}")
    seen: set[str] = set()
    placeholders: list[str] = []
    for i, node in enumerate(graph.nodes):
        where = f"graph.nodes[{i}] ({node.target[:60]})"
        is_last = i == len(graph.nodes) - 1
        if (node.op == "output") != is_last:
            raise InvalidRequest(f"{where}: the output must be the last node, and the only one of its kind")
        if not node.name or len(node.name) > 128 or node.name in seen:
            raise InvalidRequest(f"{where}: every node needs a name of its own")
        _check_node(node, seen, where)
        if node.op == "placeholder":
            placeholders.append(node.target)
        seen.add(node.name)
    if placeholders != [wanted.name for wanted in inputs]:
        raise InvalidRequest(
            f"graph: its placeholders are {placeholders}, but the inputs are {[wanted.name for wanted in inputs]}"
        )
    _check_output(graph.nodes[-1])


def _check_inputs(inputs: Sequence[CustomLossInput]) -> None:
    names = [wanted.name for wanted in inputs]
    if not 1 <= len(names) <= MAX_INPUTS or names[0] != "logprobs" or inputs[0].rank == 0:
        raise InvalidRequest(
            f"inputs: {names[: MAX_INPUTS + 1]}; there must be 1 to {MAX_INPUTS}, `logprobs` the first, of rank 1 or 2"
        )
    for name in names:
        if not _INPUT_NAME.fullmatch(name) or names.count(name) > 1:
            raise InvalidRequest(f"inputs: {name[:80]!r} is no name, or is there twice")


def _check_node(node: CustomLossNode, seen: set[str], where: str) -> None:
    match node.op:
        case "placeholder":
            if node.args or node.kwargs:
                raise InvalidRequest(f"{where}: an input of a custom loss has no default")
        case "call_function":
            if node.target not in FUNCTIONS:
                raise InvalidRequest(f"{where}: this function is not allowed in a custom loss")
            if node.target == "getattr":
                _check_getattr(node, where)
        case "call_method":
            if node.target not in METHODS:
                raise InvalidRequest(f"{where}: this method of a tensor is not allowed in a custom loss")
        case "output":
            pass
        case _:
            raise InvalidRequest(
                f"{where}: {node.op[:40]!r} is not allowed; a custom loss reads its inputs and calls functions and "
                "methods"
            )
    _check_arguments(node, seen, where)


def _check_arguments(node: CustomLossNode, seen: set[str], where: str) -> None:
    for name in sorted(_KEYWORDS_REFUSED & set(node.kwargs)):
        if node.kwargs[name] is not None and node.kwargs[name] is not False:
            raise InvalidRequest(f"{where}: the keyword {name!r} is not allowed in a custom loss")
    is_getattr = node.op == "call_function" and node.target == "getattr"
    for value in (*(node.args[:1] if is_getattr else node.args), *node.kwargs.values()):
        _check_value(value, seen, where, depth=0)
    if len(json.dumps([node.args, node.kwargs])) > _MAX_NODE_BYTES:
        raise InvalidRequest(f"{where}: its arguments are too long")


def _check_getattr(node: CustomLossNode, where: str) -> None:
    name = node.args[1] if len(node.args) == 2 else None
    if not isinstance(name, str) or name not in ATTRIBUTES or node.kwargs:
        raise InvalidRequest(
            f"{where}: of a tensor's attributes a custom loss may read {', '.join(sorted(ATTRIBUTES))}"
        )


def _check_value(value: Any, seen: set[str], where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"{where}: its arguments are nested too deeply")
    if value is None or isinstance(value, bool | float):
        return
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise InvalidRequest(f"{where}: an integer is too large")
        return
    if isinstance(value, str):
        if value not in _TEXTS and not DEVICE.fullmatch(value):
            raise InvalidRequest(
                f"{where}: the text {value[:60]!r} is not allowed; it may be a device or one of "
                f"{', '.join(sorted(_TEXTS))}"
            )
        return
    if isinstance(value, list):
        if len(cast(list[Any], value)) > _MAX_ITEMS:
            raise InvalidRequest(f"{where}: a list is too long; at most {_MAX_ITEMS} items are allowed")
        for item in cast(list[Any], value):
            _check_value(item, seen, where, depth + 1)
        return
    if not isinstance(value, dict) or len(cast(dict[Any, Any], value)) != 1:
        raise InvalidRequest(f"{where}: an argument is no value of a custom loss")
    [(kind, content)] = cast(dict[str, Any], value).items()
    _check_object(kind, content, seen, where, depth + 1)


def _check_object(kind: str, content: Any, seen: set[str], where: str, depth: int) -> None:
    match kind, content:
        case "ref", str():
            if content not in seen:
                raise InvalidRequest(f"{where}: it refers to {content[:80]!r}, which is no node before it")
        case "tuple", list():
            _check_value(content, seen, where, depth)
        case "slice", [_, _, _]:
            _check_value(content, seen, where, depth)
        case "dict", dict():
            _check_value(list(cast(dict[str, Any], content).values()), seen, where, depth)
        case "ellipsis", True:
            pass
        case "float", "inf" | "-inf" | "nan":
            pass
        case "dtype", str() if content in DTYPES:
            pass
        case "device", str() if DEVICE.fullmatch(content):
            pass
        case "layout", "strided":
            pass
        case "memory_format", "contiguous_format" | "preserve_format":
            pass
        case _:
            raise InvalidRequest(f"{where}: {kind[:40]!r} is no kind of argument of a custom loss")


def _check_output(node: CustomLossNode) -> None:
    match node.args:
        case [{"tuple": [loss, metrics]}] | [[loss, metrics]]:
            pass
        case _:
            raise InvalidRequest("graph: a custom loss returns (loss, metrics)")
    if not isinstance(loss, dict) or "ref" not in loss:
        raise InvalidRequest("graph: the loss must be a tensor that was computed")
    named = cast(dict[str, Any], metrics).get("dict") if isinstance(metrics, dict) else None
    if not isinstance(named, dict):
        raise InvalidRequest("graph: metrics must be a dict")
    for name, value in cast(dict[str, Any], named).items():
        if not _METRIC_NAME.fullmatch(name):
            raise InvalidRequest(
                f"graph: metric {name[:80]!r} must be named custom/<name>:sum or custom/<name>:mean, in lower case"
            )
        if not isinstance(value, dict) or "ref" not in value:
            raise InvalidRequest(f"graph: metric {name!r} must be a tensor that was computed")
