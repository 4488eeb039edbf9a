from collections.abc import Callable

import pytest
import torch
from torch import nn

from twinkle.server.backends.lora.linear import (
    BankSegment,
    Gradients,
    LoraLinear,
    TrainingRoute,
    wrap_modules,
)
from twinkle.server.backends.lora.spans import Spans

TOKENS = 3  # of each row


def make_segment(adapters: list[int], rank: int, seed: int, layer: str = "layer") -> BankSegment:
    draw = torch.Generator().manual_seed(seed)
    count = max(adapters) + 1
    a = {layer: torch.randn(count, rank, 5, generator=draw)}
    b = {layer: torch.randn(count, 6, rank, generator=draw)}
    # Gradients are added to what is there: ones.
    ones = {layer: torch.ones_like(a[layer])}, {layer: torch.ones_like(b[layer])}
    spans = Spans.of([TOKENS * adapters.count(i) for i in range(count)], torch.device("cpu"), torch.float32)
    return BankSegment(spans, a, b, Gradients(*ones, slice(0, count)))


@pytest.mark.parametrize(
    "banks", [[[0]], [[0, 1, 2]], [[0, 0, 1, 1]], [[0, 1, 1]], [[0, 1], [0, 0, 1]], [[0], [0], [0, 0]]]
)
@pytest.mark.parametrize("shape", ["rows", "flat"])
def test_each_row_gets_its_own_adapters_term(banks: list[list[int]], shape: str) -> None:
    torch.manual_seed(0)
    segments = [make_segment(adapters, rank=i + 2, seed=i) for i, adapters in enumerate(banks)]
    route = TrainingRoute()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    layer.requires_grad_(False)
    route.segments = segments
    x = torch.randn(sum(map(len, banks)), 3, 5, requires_grad=True)
    out = layer(x if shape == "rows" else x.reshape(-1, 5)).reshape(-1, 3, 6)

    expected = []
    row = 0
    for segment, adapters in zip(segments, banks, strict=True):
        for adapter in adapters:
            a, b = segment.a["layer"].requires_grad_(), segment.b["layer"].requires_grad_()
            expected.append(layer.base(x[row]) + x[row] @ a[adapter].T @ b[adapter].T)
            row += 1
    torch.testing.assert_close(out, torch.stack(expected))
    upstream = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * upstream).sum(), x)
    leaves = [x, *(s.a["layer"] for s in segments), *(s.b["layer"] for s in segments)]
    wanted, *matrices = torch.autograd.grad((torch.stack(expected) * upstream).sum(), leaves)
    torch.testing.assert_close(found, wanted)
    collected = [s.gradients for s in segments if s.gradients]
    sums = [g.a["layer"] for g in collected] + [g.b["layer"] for g in collected]
    torch.testing.assert_close(sums, [1 + matrix for matrix in matrices])


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda out: out.add_(torch.ones(6)),
        lambda out: out.mul_(3.0),
        lambda out: nn.functional.relu_(out),
        lambda out: out.view(-1, 2, 3)[:, 1].mul_(2.0),
        lambda out: out[..., :3].add_(1.0).tanh_(),
    ],
)
def test_its_output_may_be_changed_in_place(change: Callable[[torch.Tensor], object], is_flat: bool) -> None:
    """As that of a plain linear layer, of which autograd takes its own account."""
    torch.manual_seed(0)
    route = TrainingRoute()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    layer.requires_grad_(False)
    segment = make_segment([0, 1], rank=2, seed=0)
    route.segments = [segment]
    x = torch.randn((6, 5) if is_flat else (2, 3, 5), requires_grad=True)
    out = layer(x)
    change(out)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    a, b = segment.a["layer"].requires_grad_(), segment.b["layer"].requires_grad_()
    plain = layer.base(x) + (x.view(2, 3, 5) @ a.mT @ b.mT).view(*x.shape[:-1], 6)
    change(plain)
    torch.testing.assert_close(out, plain)
    wanted, *matrices = torch.autograd.grad(plain.square().sum(), [x, a, b])
    torch.testing.assert_close(found, wanted)
    assert segment.gradients is not None
    collected = [segment.gradients.a["layer"], segment.gradients.b["layer"]]
    torch.testing.assert_close(collected, [1 + matrix for matrix in matrices])


def test_a_layer_whose_input_needs_no_gradient_still_gives_its_matrices_theirs() -> None:
    route = TrainingRoute()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    layer.requires_grad_(False)
    segment = make_segment([0, 1], rank=2, seed=0)
    route.segments = [segment]
    x = torch.randn(2, 3, 5)
    layer(x).sum().backward()
    assert segment.gradients is not None
    ones = torch.ones(3, 6)
    for i in range(2):
        wanted = ones.T @ x[i] @ segment.a["layer"][i].T
        torch.testing.assert_close(segment.gradients.b["layer"][i], 1 + wanted)


@pytest.mark.parametrize("banks", [[[0, 1, 1]], [[0, 0, 1, 1]], [[0, 1], [0, 0, 1]]])
def test_a_layer_can_be_given_the_tokens_in_chunks(banks: list[list[int]]) -> None:
    """As the output head is: together they give what the whole gives."""
    torch.manual_seed(0)
    whole, by_chunks = (
        [make_segment(adapters, rank=i + 2, seed=i) for i, adapters in enumerate(banks)] for _ in range(2)
    )
    route = TrainingRoute()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    layer.requires_grad_(False)
    x = torch.randn(TOKENS * sum(map(len, banks)), 5)
    upstream = torch.randn(len(x), 6)
    route.segments = whole
    expected = layer(x)
    expected.backward(upstream)
    route.segments = by_chunks
    for first in range(0, len(x), 4):
        with route.narrowed(first, first + 4):
            found = layer(x[first : first + 4])
        torch.testing.assert_close(found, expected[first : first + 4])
        found.backward(upstream[first : first + 4])
    for one, other in zip(whole, by_chunks, strict=True):
        assert one.gradients is not None and other.gradients is not None
        torch.testing.assert_close(other.gradients.a, one.gradients.a)
        torch.testing.assert_close(other.gradients.b, one.gradients.b)


def test_without_a_route_or_a_matrix_it_is_the_base_layer() -> None:
    route = TrainingRoute()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    x = torch.randn(2, 3, 5)
    assert torch.equal(layer(x), layer.base(x))
    route.segments = [make_segment([0, 1], rank=2, seed=0, layer="another layer")]
    assert torch.equal(layer(x), layer.base(x))


def test_only_the_layers_named_are_wrapped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    weight = model.get_submodule("1.0").weight
    wrap_modules(model, ["1.0"], lambda base, name: LoraLinear(base, name, TrainingRoute()))
    kinds = [type(model.get_submodule(name)).__name__ for name in ("0", "1.0", "1.1")]
    assert kinds == ["Linear", "LoraLinear", "Linear"]
    assert model.get_submodule("1.0").weight is weight
