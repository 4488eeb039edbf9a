"""What graphs are let in, and what is kept out, by name alone."""

from __future__ import annotations

from typing import Any

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode
from twinkle.server.backends.lora.losses.custom_check import FUNCTIONS, METHODS, check

LOGPROBS = CustomLossInput(name="logprobs", rank=1)


def node(op: str, name: str, target: str, *args: Any, **kwargs: Any) -> CustomLossNode:
    return CustomLossNode(op=op, name=name, target=target, args=list(args), kwargs=kwargs)


def graph(*middle: CustomLossNode, loss: str = "x", metrics: dict[str, Any] | None = None) -> CustomLossGraph:
    output = node("output", "output", "output", {"tuple": [{"ref": loss}, {"dict": metrics or {}}]})
    return CustomLossGraph(nodes=[node("placeholder", "lp", "logprobs"), *middle, output])


def summed(**kwargs: Any) -> CustomLossNode:
    return node("call_method", "x", "sum", {"ref": "lp"}, **kwargs)


def test_a_plain_graph_is_let_in():
    squared = node("call_function", "y", "operator.mul", {"ref": "lp"}, {"ref": "lp"})
    check([LOGPROBS], graph(squared, summed(dim=[0], dtype={"dtype": "float32"})))
    check([LOGPROBS], graph(summed(inplace=False, out=None)))  # as torch.fx writes defaults
    check([LOGPROBS], graph(summed(), metrics={"custom/a.b/c-1:mean": {"ref": "x"}}))


@pytest.mark.parametrize(
    "target",
    [
        "builtins.eval",
        "eval",
        "exec",
        "__import__",
        "open",
        "os.system",
        "subprocess.run",
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "torch.compile",
        "torch.zeros",
        "torch.empty",
        "torch.arange",
        "torch.rand",
        "torch.rand_like",
        "torch.from_file",
        "torch.ops.aten.add",
        "torch.matmul",
        "torch.outer",
        "torch.repeat_interleave",
        "torch.nonzero",
        "torch.nn.functional.one_hot",
        "torch.nn.functional.dropout",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.setitem",
        "operator.iadd",
        "operator.lshift",
        "operator.call",
        "math.factorial",
        "math.comb",
        "setattr",
        "type",
    ],
)
def test_functions_outside_the_list_are_refused(target: str):
    assert target not in FUNCTIONS
    with pytest.raises(InvalidRequest, match="this function is not allowed"):
        check([LOGPROBS], graph(node("call_function", "x", target, {"ref": "lp"})))


@pytest.mark.parametrize(
    "target",
    ["item", "numpy", "tolist", "backward", "add_", "zero_", "repeat", "__class__", "__reduce__", "share_memory_",
     "register_hook", "apply_", "map_", "data_ptr", "storage", "new_zeros", "set_", "requires_grad_", "retain_grad"],
)  # fmt: skip
def test_methods_outside_the_list_are_refused(target: str):
    assert target not in METHODS
    with pytest.raises(InvalidRequest, match="this method of a tensor is not allowed"):
        check([LOGPROBS], graph(node("call_method", "x", target, {"ref": "lp"})))


def test_nothing_that_is_listed_writes_in_place():
    assert not [name for name in METHODS if name.endswith("_")]
    assert not [name for name in FUNCTIONS if name.endswith("_") and not name.startswith("operator.")]


@pytest.mark.parametrize(
    "attribute", ["__class__", "__globals__", "grad", "grad_fn", "data", "real", "is_cuda"]
)
def test_attributes_outside_the_list_are_refused(attribute: str):
    with pytest.raises(InvalidRequest, match="may read T, device, dtype"):
        check([LOGPROBS], graph(node("call_function", "x", "getattr", {"ref": "lp"}, attribute)))


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


BAD_GRAPHS: dict[str, tuple[CustomLossGraph, str]] = {
    "no nodes": (CustomLossGraph(nodes=[]), "0 nodes"),
    "too many": (CustomLossGraph(nodes=[node("placeholder", "lp", "logprobs")] * 5000), "5000 nodes"),
    "a module": (graph(node("call_module", "x", "layer")), "'call_module' is not allowed"),
    "a captured tensor": (graph(node("get_attr", "x", "_tensor")), "'get_attr' is not allowed"),
    "a later node": (graph(node("call_method", "x", "sum", {"ref": "z"})), "no node before it"),
    "itself": (graph(node("call_method", "x", "sum", {"ref": "x"})), "no node before it"),
    "a name twice": (graph(summed(), summed()), "a name of its own"),
    "deep arguments": (graph(summed(dim=nested(50))), "nested too deeply"),
    "long arguments": (graph(summed(dim=[["batchmean"] * 200] * 20)), "too long"),
    "a huge integer": (graph(node("call_function", "x", "operator.pow", {"ref": "lp"}, 2**80)), "too large"),
    "an unknown object": (graph(summed(dim={"code": "1"})), "'code' is no kind of argument"),
    "a device without memory": (graph(node("call_method", "x", "to", {"ref": "lp"}, "meta")), "text 'meta' is not"),
    "a costly norm": (graph(node("call_method", "x", "norm", {"ref": "lp"}, "nuc")), "text 'nuc' is not"),
    "in place": (graph(summed(inplace=True)), "keyword 'inplace' is not allowed"),
    "a long list": (graph(summed(dim=[0] * 1000)), "a list is too long"),
    "two keys": (graph(summed(dim={"ref": "lp", "tuple": []})), "no value of a custom loss"),
    "an unknown dtype": (graph(summed(dtype={"dtype": "load"})), "'dtype' is no kind"),
    "an output buffer": (graph(summed(out={"ref": "lp"})), "keyword 'out' is not allowed"),
    "a generator": (graph(summed(generator=1)), "keyword 'generator' is not allowed"),
    "an unknown input": (graph(node("placeholder", "y", "advantages"), summed()), "its placeholders are"),
    "a default": (graph(node("placeholder", "y", "advantages", 1), summed()), "has no default"),
    "no output": (CustomLossGraph(nodes=[node("placeholder", "lp", "logprobs"), summed()]), "must be the last"),
    "a metric's name": (graph(summed(), metrics={"loss:sum": {"ref": "x"}}), "must be named custom/"),
    "a metric's value": (graph(summed(), metrics={"custom/a:sum": 1.0}), "must be a tensor"),
    "a number as loss": (
        CustomLossGraph(
            nodes=[node("placeholder", "lp", "logprobs"), node("output", "o", "output", {"tuple": [1, {"dict": {}}]})]
        ),
        "must be a tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_graphs_that_are_built_wrongly_are_refused(case: str):
    bad, message = BAD_GRAPHS[case]
    with pytest.raises(InvalidRequest, match=message):
        check([LOGPROBS], bad)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["advantages"],
        ["logprobs", "logprobs"],
        ["logprobs", "Not A Name"],
        ["logprobs", *"abcdefghijklmnop"],
    ],
)
def test_inputs_begin_with_logprobs_and_have_names(names: list[str]):
    inputs = [CustomLossInput(name=name, rank=1) for name in names]
    with pytest.raises(InvalidRequest, match="inputs: "):
        check(inputs, graph(summed()))
