"""Losses traced by the real SDK, run as data, against the functions that they were."""

from __future__ import annotations

import copy
import random
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode
from twinkle.server.backends.custom_loss import FUNCTIONS, check
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.backends.transformers import custom_loss


def ppo(logprobs, sampled, advantages):
    ratio = torch.exp(logprobs - sampled)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/clipped:sum": (ratio != clipped).float().sum()}


def cispo(logprobs, sampled, advantages):
    weight = (logprobs - sampled).exp().detach().clamp(max=4.0)
    return -(weight * advantages * logprobs).sum(), {}


def preference(logprobs, sampled, advantages):
    """A chosen and a rejected half in one sequence."""
    half = logprobs.shape[0] // 2
    margin = (logprobs - sampled)[:half].sum() - (logprobs - sampled)[half:].sum()
    return -F.logsigmoid(0.1 * margin), {"custom/margin:mean": margin}


def distillation(logprobs, distribution):
    kl = (distribution * (torch.log(distribution + 1e-9) - logprobs)).sum(dim=-1)
    return kl.mean(), {"custom/worst:sum": kl.max()}


def masked_mean(logprobs, sampled, advantages):
    mask = advantages > 0
    return -(logprobs[mask] * advantages[mask]).sum() / mask.sum(), {}


def huber(logprobs, sampled, advantages):
    return F.huber_loss(logprobs, sampled, reduction="sum", delta=0.5), {
        "custom/n:sum": advantages.abs().sum()
    }


def entropy_bonus(logprobs, sampled, advantages):
    probabilities = torch.softmax(logprobs, dim=0)
    entropy = -(probabilities * torch.log_softmax(logprobs, 0)).sum()
    return -(advantages * logprobs).sum() - 0.01 * entropy, {"custom/entropy:mean": entropy}


def sequence_level(logprobs, sampled, advantages):
    log_ratio = torch.where(advantages != 0, logprobs - sampled, torch.zeros_like(logprobs)).mean()
    return -(log_ratio.exp() * advantages.sum()), {}


def shifted(logprobs, sampled, advantages):
    change = logprobs[1:] - logprobs[:-1]
    stacked = torch.stack([change, sampled[1:] * 1.0])
    return (stacked.pow(2).sum(0) * 2**-1).sum() + F.softplus(logprobs).sum(), {}


LOSSES: list[Callable[..., Any]] = [
    ppo, cispo, preference, distillation, masked_mean, huber, entropy_bonus, sequence_level, shifted,
]  # fmt: skip


def traced(function: Callable[..., Any]) -> CustomLoss:
    """What the SDK sends, as we read it."""
    ranks = (
        {"logprobs": 2, "distribution": 2}
        if function is distillation
        else {"logprobs": 1, "sampled": 1, "advantages": 1}
    )
    handle = trace_loss(function, ranks, "session")  # pyright: ignore
    graph = CustomLossGraph.model_validate(encode_graph(handle).model_dump())
    inputs = tuple(CustomLossInput.model_validate(wanted.model_dump()) for wanted in handle.inputs)
    check(inputs, graph)
    return CustomLoss(f"{function.__name__} {random.random()}", function.__name__, inputs, graph)


def example(function: Callable[..., Any], length: int = 7) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(length)
    if function is distillation:
        rows = torch.log_softmax(torch.randn(length, 4, generator=draw), -1)
        return rows.requires_grad_(), {
            "distribution": torch.softmax(torch.randn(length, 4, generator=draw), -1)
        }
    logprobs = -torch.rand(length, generator=draw)
    others = {
        "sampled": logprobs + 0.5 * torch.randn(length, generator=draw),
        "advantages": torch.randn(length, generator=draw).round(decimals=1),
    }
    return logprobs.requires_grad_(), others


@pytest.mark.parametrize("function", LOSSES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("length", [2, 7])
def test_value_gradient_and_metrics_are_those_of_the_function(function: Callable[..., Any], length: int):
    loss = traced(function)
    logprobs, others = example(function, length)
    value, metrics = custom_loss.run(loss, logprobs, others)
    [gradient] = torch.autograd.grad(value, logprobs)
    expected, expected_metrics = function(logprobs, *others.values())
    [expected_gradient] = torch.autograd.grad(expected, logprobs)
    torch.testing.assert_close(value, expected, equal_nan=True)
    torch.testing.assert_close(gradient, expected_gradient, equal_nan=True)
    assert set(metrics) == set(expected_metrics)
    for name, metric in metrics.items():
        torch.testing.assert_close(metric, expected_metrics[name].detach().float())
        assert not metric.requires_grad


def test_every_listed_function_is_there():
    assert set(custom_loss._TABLE) == FUNCTIONS  # pyright: ignore[reportPrivateUsage]
    assert all(callable(function) for function in custom_loss._TABLE.values())  # pyright: ignore


# ---------------------------------------------------------------- what must not happen


def a_loss(*nodes: tuple[str, str, str, list[Any], dict[str, Any]], result: str) -> CustomLoss:
    made = [CustomLossNode(op="placeholder", name="lp", target="logprobs")]
    made += [
        CustomLossNode(op=op, name=n, target=t, args=args, kwargs=kwargs) for op, n, t, args, kwargs in nodes
    ]
    output = {"tuple": [{"ref": result}, {"dict": {}}]}
    made.append(CustomLossNode(op="output", name="output", target="output", args=[output]))
    graph = CustomLossGraph(nodes=made)
    inputs = (CustomLossInput(name="logprobs", rank=1),)
    check(inputs, graph)
    return CustomLoss(f"bad {random.random()}", "bad", inputs, graph)


LP = {"ref": "lp"}


def outer_products(times: int) -> list[tuple[str, str, str, list[Any], dict[str, Any]]]:
    """Every step squares the number of values."""
    nodes: list[tuple[str, str, str, list[Any], dict[str, Any]]] = []
    last = "lp"
    for i in range(times):
        nodes += [
            ("call_method", f"column{i}", "unsqueeze", [{"ref": last}, 1], {}),
            ("call_method", f"row{i}", "unsqueeze", [{"ref": last}, 0], {}),
            ("call_function", f"square{i}", "operator.mul", [{"ref": f"column{i}"}, {"ref": f"row{i}"}], {}),
            ("call_method", f"flat{i}", "flatten", [{"ref": f"square{i}"}], {}),
        ]
        last = f"flat{i}"
    return [*nodes, ("call_method", "x", "sum", [{"ref": last}], {})]


BOMBS: dict[str, CustomLoss] = {
    "outer products": a_loss(*outer_products(6), result="x"),
    "expand": a_loss(
        ("call_method", "w", "unsqueeze", [LP, 0], {}),
        ("call_method", "e", "expand", [{"ref": "w"}, 10**9, -1], {}),
        ("call_function", "x", "torch.sum", [{"ref": "e"}], {}),
        result="x",
    ),
    "a power of integers": a_loss(
        ("call_function", "p", "operator.pow", [10, 10**9], {}),
        ("call_function", "x", "operator.mul", [LP, {"ref": "p"}], {}),
        result="x",
    ),
    "a repeated text": a_loss(("call_function", "x", "operator.mul", ["abc", 10**9], {}), result="x"),
    "a repeated list": a_loss(("call_function", "x", "operator.mul", [[1], 10**9], {}), result="x"),
    "growing integers": a_loss(
        ("call_function", "a", "operator.mul", [2**62, 2**62], {}),
        ("call_method", "x", "sum", [LP], {}),
        result="x",
    ),
    "a vector as loss": a_loss(("call_method", "x", "exp", [LP], {}), result="x"),
    "no gradient": a_loss(
        ("call_method", "d", "detach", [LP], {}), ("call_method", "x", "sum", [{"ref": "d"}], {}), result="x"
    ),
    "shapes that don't fit": a_loss(
        ("call_method", "r", "reshape", [LP, 3, 3], {}), ("call_method", "x", "sum", [{"ref": "r"}], {}), result="x"
    ),
    "a tensor as truth": a_loss(("call_function", "x", "torch.clamp", [LP], {}), result="x"),
    "a method of a number": a_loss(
        ("call_function", "n", "getattr", [LP, "ndim"], {}),
        ("call_method", "x", "sum", [{"ref": "n"}], {}),
        result="x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_what_cannot_or_must_not_be_computed_is_refused_by_node(case: str):
    logprobs = (-torch.rand(100)).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match="custom loss 'bad'"):
        custom_loss.run(BOMBS[case], logprobs, {})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, "KiB"


@given(seed=st.integers(0, 10**9))
@settings(max_examples=300, deadline=None)
def test_a_graph_with_changes_is_refused_or_runs(seed: int):
    """Never anything but an InvalidRequest."""
    draw = random.Random(seed)
    function = draw.choice(LOSSES)
    loss = TRACED[function]
    values = copy.deepcopy(loss.graph.model_dump())
    for _ in range(draw.randint(1, 4)):
        node = draw.choice(values["nodes"])
        kind = draw.choice(["op", "target", "args", "kwargs", "swap", "drop", "scalar"])
        other = draw.choice(values["nodes"])
        if kind in ("op", "target", "args", "kwargs"):
            node[kind] = copy.deepcopy(other[kind])
        elif kind == "swap":
            node["args"] = draw.sample(node["args"], len(node["args"]))
        elif kind == "drop":
            values["nodes"].remove(node)
            if not values["nodes"]:
                return
        else:
            node["args"].append(draw.choice([0, -1, 10**12, 1.5, None, True, "x", {"ellipsis": True}, []]))
    try:
        graph = CustomLossGraph.model_validate(values)
        check(loss.inputs, graph)
        logprobs, others = example(function)
        changed = CustomLoss(f"changed {seed} {draw.random()}", "changed", loss.inputs, graph)
        value, _ = custom_loss.run(changed, logprobs, others)
    except InvalidRequest:
        return
    assert value.ndim == 0 and value.dtype == torch.float32


TRACED = {function: traced(function) for function in LOSSES}
