"""Losses traced by the real SDK, run as data, against the functions that they were."""

from __future__ import annotations

import copy
import math
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
from twinkle.server.backends.lora.losses import custom_eval
from twinkle.server.backends.lora.losses.custom_check import FUNCTIONS, METHODS, check
from twinkle.server.backends.protocol import CustomLoss


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


def by_position(logprobs, sampled, advantages):
    best = logprobs.max(dim=0).values
    order = torch.sort(advantages, descending=True).indices
    ranked = logprobs[order] - best
    pieces = torch.split(F.pad(ranked, (1, 0)), [1, logprobs.shape[0]])
    return -(pieces[1] / math.sqrt(logprobs.shape[0])).sum() + torch.norm(sampled - logprobs), {}


def candidates_by_mask(logprobs, distribution):
    likely = distribution.sum(0) > distribution.mean(0)
    chosen = logprobs[..., likely] - logprobs[..., :1]
    return F.normalize(chosen, dim=0).sum() - F.cosine_similarity(logprobs, distribution, dim=1).mean(), {}


LOSSES: list[Callable[..., Any]] = [
    ppo, cispo, preference, distillation, masked_mean, huber, entropy_bonus, sequence_level, shifted,
    by_position, candidates_by_mask,
]  # fmt: skip


MATRICES = (distillation, candidates_by_mask)


def traced(function: Callable[..., Any]) -> CustomLoss:
    """What the SDK sends, as we read it."""
    ranks = (
        {"logprobs": 2, "distribution": 2}
        if function in MATRICES
        else {"logprobs": 1, "sampled": 1, "advantages": 1}
    )
    handle = trace_loss(function, ranks, "session")  # pyright: ignore
    graph = CustomLossGraph.model_validate(encode_graph(handle).model_dump())
    inputs = tuple(CustomLossInput.model_validate(wanted.model_dump()) for wanted in handle.inputs)
    check(inputs, graph)
    return CustomLoss(f"{function.__name__} {random.random()}", function.__name__, inputs, graph)


def example(function: Callable[..., Any], length: int = 7) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(length)
    if function in MATRICES:
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
    value, metrics = custom_eval.run(loss, logprobs, others)
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
    for table, names in ((custom_eval._FUNCTIONS, FUNCTIONS), (custom_eval._METHODS, METHODS)):
        assert set(table) == names
        assert all(callable(function) for function in table.values())


# Functions that the executor calls in its own way, and others that are easily got wrong: x is [7], y is another [7].
SINGLE: dict[str, Callable[..., Any]] = {
    "a gather": lambda x, y: x.gather(0, torch.sort(y).indices),
    "a list as index": lambda x, y: x[[0, -1, 2]],
    "a selection": lambda x, y: torch.index_select(x, 0, torch.sort(y)[1]),
    "masked": lambda x, y: torch.masked_select(x, y > 0),
    "a mask twice": lambda x, y: x[y > 0][torch.sort(y[y > 0]).indices],
    "rolled": lambda x, y: torch.roll(x, 1) - x.roll(-1, 0),
    "chunks": lambda x, y: x.chunk(2)[1] * torch.chunk(y, 2)[1],
    "unbound": lambda x, y: torch.unbind(x)[2] + x.unbind(0)[1],
    "split": lambda x, y: x.split(3)[2] + torch.split(x, [3, 4])[0].sum(),
    "a quantile": lambda x, y: torch.quantile(x, 0.25) + x.quantile(0.5, dim=0, interpolation="nearest"),
    "divided": lambda x, y: torch.div(x, y, rounding_mode=None) + x.div(2.0),
    "differences": lambda x, y: x.diff() + torch.diff(y),
    "another view": lambda x, y: x.view(1, -1) + x.view((7, 1)),
    "probabilities": lambda x, y: F.binary_cross_entropy(torch.sigmoid(x), (y > 0).float(), reduction="none"),
    "activations": lambda x, y: F.relu(x) + F.silu(x) + F.elu(x, 0.5) + F.leaky_relu(x, 0.1) + F.hardtanh(x),
    "special": lambda x, y: torch.special.expit(x) + torch.special.entr(-x) + torch.special.logsumexp(x, 0),
    "filled": lambda x, y: x.masked_fill(y > 0, 0.5) + torch.full_like(x, math.inf).isinf().float() * x,
    "other types": lambda x, y: x.to(torch.float64) * y.to("cpu") + x.type_as(y) + x.to(y.device).double(),
    "the best": lambda x, y: x.topk(2).values.sum() + torch.kthvalue(x, 3)[0] + torch.cummax(x, 0).values,
    "windows": lambda x, y: x.narrow(0, 1, 3) + F.pad(x, [0, 2], value=1.0)[..., None, -3:],
    "pieces put together": lambda x, y: torch.cat([x, y]).unflatten(0, (2, 7)).transpose(0, 1).flip(0).cumsum(0),
    "logic": lambda x, y: torch.where((x < -0.5) & ~(y > 0) | (y == 0), x, x * 2),
    "smooth": lambda x, y: F.smooth_l1_loss(x, y, beta=0.3) + F.kl_div(x, y, log_target=True, reduction="batchmean"),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLE)
def test_functions_give_what_torch_gives(case: str):
    def alone(logprobs, sampled, advantages):
        result = SINGLE[case](logprobs, advantages)
        return (result * result).sum() + result.sum(), {}

    loss = traced(alone)
    logprobs, others = example(alone)
    value, _ = custom_eval.run(loss, logprobs, others)
    expected = alone(logprobs, **others)[0].float()
    torch.testing.assert_close(value, expected)
    [gradient], [expected_gradient] = (torch.autograd.grad(result, logprobs) for result in (value, expected))
    torch.testing.assert_close(gradient, expected_gradient)


def test_gradients_are_scaled_by_what_comes_after():
    loss = traced(ppo)
    logprobs, others = example(ppo)
    value, _ = custom_eval.run(loss, logprobs, others)
    [tripled] = torch.autograd.grad(3 * value, logprobs)
    [plain] = torch.autograd.grad(ppo(logprobs, *others.values())[0], logprobs)
    torch.testing.assert_close(tripled, 3 * plain)


def test_a_loss_is_computed_without_gradients_too():
    loss = traced(ppo)
    logprobs, others = example(ppo)
    with torch.no_grad():
        value, _ = custom_eval.run(loss, logprobs, others)
    torch.testing.assert_close(value, ppo(logprobs, *others.values())[0].detach())
    assert not value.requires_grad


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
    "a repeated text": a_loss(("call_function", "x", "operator.mul", ["mean", 10**9], {}), result="x"),
    "a repeated list": a_loss(("call_function", "x", "operator.mul", [[1], 10**9], {}), result="x"),
    "growing integers": a_loss(
        ("call_function", "a", "operator.mul", [2**62, 2**62], {}),
        ("call_method", "x", "sum", [LP], {}),
        result="x",
    ),
    "many small tensors": a_loss(
        ("call_method", "c", "split", [LP, 1], {}),
        *(("call_method", f"c{i}", "split", [LP, 1], {}) for i in range(900)),
        ("call_method", "x", "sum", [LP], {}),
        result="x",
    ),
    "much work for little": a_loss(
        ("call_method", "w", "unsqueeze", [LP, 1], {}),
        ("call_method", "e", "expand", [{"ref": "w"}, -1, 10_000], {}),
        *(("call_function", f"m{i}", "torch.median", [{"ref": "e"}], {}) for i in range(100)),
        ("call_method", "x", "sum", [LP], {}),
        result="x",
    ),
    "differences of differences": a_loss(
        ("call_function", "d", "torch.diff", [LP], {"n": 99}),
        ("call_method", "x", "sum", [{"ref": "d"}], {}),
        result="x",
    ),
    "more as a mask leaves less": a_loss(
        ("call_function", "m", "operator.gt", [LP, 1.0], {}),
        ("call_function", "s", "operator.getitem", [LP, {"ref": "m"}], {}),
        ("call_method", "n", "numel", [{"ref": "s"}], {}),
        ("call_function", "d", "operator.sub", [100, {"ref": "n"}], {}),
        ("call_function", "big", "operator.mul", [{"ref": "d"}, 10**8], {}),
        ("call_method", "one", "sum", [LP, 0, True], {}),
        ("call_method", "e", "expand", [{"ref": "one"}, {"ref": "big"}], {}),
        ("call_function", "sq", "operator.mul", [{"ref": "e"}, {"ref": "e"}], {}),
        ("call_method", "x", "sum", [{"ref": "sq"}], {}),
        result="x",
    ),
    "in place": a_loss(
        ("call_method", "d", "detach", [LP], {}),
        ("call_function", "r", "torch.nn.functional.relu", [{"ref": "d"}, True], {}),
        ("call_function", "y", "operator.mul", [LP, {"ref": "r"}], {}),
        ("call_method", "x", "sum", [{"ref": "y"}], {}),
        result="x",
    ),
    "memory read as another dtype": a_loss(
        ("call_method", "v", "view", [LP, {"dtype": "bool"}], {}),
        ("call_method", "x", "sum", [{"ref": "v"}], {}),
        result="x",
    ),
    "integers cut off after division": a_loss(
        ("call_function", "true", "operator.lt", [LP, 1.0], {}),
        ("call_method", "i", "long", [LP], {}),
        ("call_method", "low", "masked_fill", [{"ref": "i"}, {"ref": "true"}, -(2**63 - 1)], {}),
        ("call_function", "least", "operator.sub", [{"ref": "low"}, 1], {}),
        ("call_method", "q", "div", [{"ref": "least"}, -1], {"rounding_mode": "trunc"}),
        ("call_function", "y", "operator.mul", [LP, {"ref": "q"}], {}),
        ("call_method", "x", "sum", [{"ref": "y"}], {}),
        result="x",
    ),
    "an index out of range": a_loss(
        ("call_method", "i", "long", [LP], {}),
        ("call_function", "far", "operator.sub", [{"ref": "i"}, 1000], {}),
        ("call_method", "g", "gather", [LP, 0, {"ref": "far"}], {}),
        ("call_method", "x", "sum", [{"ref": "g"}], {}),
        result="x",
    ),
    "no probabilities": a_loss(
        ("call_function", "b", "torch.nn.functional.binary_cross_entropy", [LP, LP], {}), result="b"
    ),
    "what has no derivative": a_loss(
        ("call_function", "f", "operator.floordiv", [LP, 2], {}),
        ("call_method", "x", "sum", [{"ref": "f"}], {}),
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
        custom_eval.run(BOMBS[case], logprobs, {})
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
        value, _ = custom_eval.run(changed, logprobs, others)
    except InvalidRequest:
        return
    assert value.ndim == 0 and value.dtype == torch.float32


TRACED = {function: traced(function) for function in LOSSES}
