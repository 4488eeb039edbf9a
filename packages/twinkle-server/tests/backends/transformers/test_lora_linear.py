import pytest
import torch
from torch import nn

from twinkle.server.backends.transformers.lora_linear import (
    LoraLinear,
    Route,
    Segment,
    spans_of,
)
from twinkle.server.backends.transformers.wrapped_linear import wrap_linears


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ([0], (1, None)),
        ([0, 0, 0], (1, None)),
        ([0, 1, 2], (3, None)),
        ([0, 0, 1, 1], (2, None)),
        ([0, 0, 1], (3, [0, 0, 1])),
        ([0, 0, 0, 0, 1, 1, 2, 2], (4, [0, 0, 1, 2])),
    ],
)
def test_rows_fall_into_as_few_equal_spans_as_possible(
    adapters: list[int], expected: tuple[int, list[int] | None]
) -> None:
    assert spans_of(adapters) == expected


def make_segment(adapters: list[int], rank: int, seed: int, layer: str = "layer") -> Segment:
    draw = torch.Generator().manual_seed(seed)
    count = max(adapters) + 1
    spans, of_span = spans_of(adapters)
    return Segment(
        rows=len(adapters),
        spans=spans,
        adapter_of_span=None if of_span is None else torch.tensor(of_span),
        a={layer: torch.randn(count, rank, 5, generator=draw, requires_grad=True)},
        b={layer: torch.randn(count, 6, rank, generator=draw, requires_grad=True)},
    )


@pytest.mark.parametrize(
    "banks", [[[0]], [[0, 1, 2]], [[0, 0, 1, 1]], [[0, 1, 1]], [[0, 1], [0, 0, 1]], [[0], [0], [0, 0]]]
)
@pytest.mark.parametrize("shape", ["rows", "flat"])
def test_each_row_gets_its_own_adapters_term(banks: list[list[int]], shape: str) -> None:
    torch.manual_seed(0)
    segments = [make_segment(adapters, rank=i + 2, seed=i) for i, adapters in enumerate(banks)]
    route = Route()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    layer.requires_grad_(False)
    route.segments = segments
    x = torch.randn(sum(map(len, banks)), 3, 5, requires_grad=True)
    out = layer(x if shape == "rows" else x.reshape(-1, 5)).reshape(-1, 3, 6)

    expected = []
    row = 0
    for segment, adapters in zip(segments, banks, strict=True):
        for adapter in adapters:
            a, b = segment.a["layer"][adapter], segment.b["layer"][adapter]
            expected.append(layer.base(x[row]) + x[row] @ a.T @ b.T)
            row += 1
    torch.testing.assert_close(out, torch.stack(expected))
    leaves = [x, *(s.a["layer"] for s in segments), *(s.b["layer"] for s in segments)]
    upstream = torch.randn_like(out)
    found = torch.autograd.grad((out * upstream).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((torch.stack(expected) * upstream).sum(), leaves))


def test_without_a_route_or_a_matrix_it_is_the_base_layer() -> None:
    route = Route()
    layer = LoraLinear(nn.Linear(5, 6), "layer", route)
    x = torch.randn(2, 3, 5)
    assert torch.equal(layer(x), layer.base(x))
    route.segments = [make_segment([0, 1], rank=2, seed=0, layer="another layer")]
    assert torch.equal(layer(x), layer.base(x))


def test_only_the_layers_named_are_wrapped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    weight = model.get_submodule("1.0").weight
    wrap_linears(model, ["1.0"], lambda base, name: LoraLinear(base, name, Route()))
    kinds = [type(model.get_submodule(name)).__name__ for name in ("0", "1.0", "1.1")]
    assert kinds == ["Linear", "LoraLinear", "Linear"]
    assert model.get_submodule("1.0").weight is weight
