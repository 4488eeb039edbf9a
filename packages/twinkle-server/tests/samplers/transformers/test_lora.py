"""Routes of rows to adapters: every row gets its own adapter's term, worked out from the weights as they were given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import AdapterSpec, AdapterState
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import lora
from twinkle.server.samplers.transformers.lora import ResidentAdapter, RouteMaker

WIDTHS = {"l.q_proj": (6, 8), "l.k_proj": (6, 4), "l.o_proj": (8, 6), "l.v_proj": (6, 4), "head": (6, 11)}
CPU = torch.device("cpu")


def make_state(seed: int, rank: int) -> AdapterState:
    draw = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    for layer, (width, out) in WIDTHS.items():
        prefix = f"base_model.model.{layer}"
        weights[f"{prefix}.lora_A.weight"] = draw.normal(size=(rank, width)).astype(np.float32)
        weights[f"{prefix}.lora_B.weight"] = draw.normal(size=(out, rank)).astype(np.float32)
    return AdapterState(AdapterSpec(rank=rank, alpha=5), list(WIDTHS), weights)


STATES = {f"{rank}-{i}": make_state(10 * rank + i, rank) for rank in (2, 3) for i in range(5)}


def resident(names: Sequence[str]) -> dict[str | None, ResidentAdapter | None]:
    return {None: None, **{name: ResidentAdapter.of(STATES[name], torch.float32, CPU) for name in names}}


def expected_term(name: str | None, layer: str, x: torch.Tensor) -> torch.Tensor:
    """(alpha / rank) B A x, of [n, in_features]."""
    if name is None:
        return torch.zeros(len(x), WIDTHS[layer][1])
    state = STATES[name]
    a, b = (torch.tensor(state.weights[f"base_model.model.{layer}.lora_{m}.weight"]) for m in "AB")
    return 5 / state.spec.rank * x @ a.T @ b.T


def assert_terms(maker: RouteMaker, adapters: dict, names: list[str | None], n: int) -> None:
    groups = maker.make([adapters[name] for name in names])
    generator = torch.Generator().manual_seed(n)
    inputs = {width: torch.randn(len(names), n, width, generator=generator) for width in (6, 8)}
    for layer, (width, out_width) in WIDTHS.items():
        x = inputs[width]
        out = torch.ones(len(names) * n, out_width)
        for group in groups:
            group.add_term(layer, x, out)
        wanted = torch.cat([1 + expected_term(name, layer, own) for name, own in zip(names, x, strict=True)])
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("together", [0, 2**20])
def test_each_row_gets_its_own_term_however_the_rows_change(together: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora, "TOGETHER", together)
    maker, adapters = RouteMaker(CPU), resident(list(STATES))
    batches: list[list[str | None]] = [
        ["2-0"],
        ["2-0", None, "2-0"],
        ["2-0", "2-1", None, "3-0", "2-0"],
        ["2-1", "2-2", "2-1"],
        ["3-0", "3-1", "2-3", "2-4", "2-2", "2-0", None],
        ["2-4"],
        ["2-3", "2-4", "2-4", "2-4"],
    ]
    for names in batches:
        for n in (1, 3):
            assert_terms(maker, adapters, names, n)
        maker.keep({adapters[name] for name in names})


def test_a_slot_that_was_given_up_is_used_again_and_stacks_that_nobody_needs_go():
    maker, adapters = RouteMaker(CPU), resident(list(STATES))
    maker.make([adapters[f"2-{i}"] for i in range(4)])
    [stack] = maker._stacks.values()
    maker.keep({adapters[name] for name in ("2-0", "2-2")})
    maker.make([adapters[name] for name in ("2-4", "2-0", "2-2")])
    assert list(maker._stacks.values()) == [stack] and len(stack.slots) == 4
    assert stack.slots[:3] == [adapters["2-0"], adapters["2-4"], adapters["2-2"]]
    maker.keep({None})
    assert not maker._stacks


def test_numbers_beyond_all_bounds_stay_with_their_adapter():
    states = {"good": make_state(1, 2), "huge": make_state(2, 2)}
    for name, matrix in states["huge"].weights.items():
        matrix[:] = 3e38 if "lora_A" in name else 1e37
    good, huge = (ResidentAdapter.of(states[name], torch.float32, CPU) for name in ("good", "huge"))
    x = torch.full((2, 1, 6), 100.0)
    alone, mixed = torch.zeros(2, 11), torch.zeros(2, 11)
    for adapters, out in (([good, good], alone), ([good, huge], mixed)):
        for group in RouteMaker(CPU).make(adapters):
            group.add_term("head", x, out)
    assert alone.isfinite().all() and not mixed[1].isfinite().any()
    torch.testing.assert_close(mixed[0], alone[0])


def test_an_adapter_that_is_not_finite_is_refused(engine, states):
    spoilt = AdapterState(
        states["small"].spec,
        states["small"].target_modules,
        {name: matrix.copy() for name, matrix in states["small"].weights.items()},
    )
    next(iter(spoilt.weights.values()))[0, 0] = np.nan
    engine.add_adapter("spoilt", spoilt)
    request = GenerateRequest("t", "spoilt", np.array([1]), SamplingParams(max_tokens=1))
    with pytest.raises(InvalidRequest, match="not finite"):
        engine.generate(request).result(10)
