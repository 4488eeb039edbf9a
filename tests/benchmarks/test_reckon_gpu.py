"""The FLOPs, bytes and operations that a training step is reckoned with, against counts of passes on narrow models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reckon_gpu
import torch
from on_gpu.models import make
from on_gpu.traffic import Kind, Traffic
from on_gpu.training import Case, adapter_name
from reckon_gpu import Levers, Rates, Shape, Step
from transformers import PreTrainedConfig, Qwen3_5TextConfig, Qwen3Config

from twinkle.server.backends.protocol import AdapterSpec

RANK = 8
# Counts may be lower than what is reckoned with, which is for large models, but hardly higher.
HIGHEST, LOWEST = 1.1, 0.75


def narrow(name: str, layers: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if name == "qwen3":
        return Qwen3Config(**sizes, intermediate_size=768, num_hidden_layers=layers, head_dim=64)
    return Qwen3_5TextConfig(
        **sizes,
        intermediate_size=512,
        num_hidden_layers=layers + 1,
        layer_types=["linear_attention"] * layers + ["full_attention"],
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )


@cache
def counted(name: str, layers: int, length: int, tenants: int = 1) -> dict[Kind, tuple[int, float, float]]:
    """Of a pass: operations, and bytes and FLOPs a token."""
    case = Case("cross_entropy", tenants, rows=1, length=length)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else the rows are shared out over threads, in which nothing is counted
    try:
        with ExitStack() as stack:
            backend = make(stack, narrow(name, layers), torch.device("cpu"), "bfloat16").backend()
            rows = [row for tenant in range(tenants) for row in case.rows_of(tenant, 512)]
            for tenant in range(tenants):
                backend.add_adapter(adapter_name(tenant), AdapterSpec(rank=RANK, train_unembed=False))
            backend.forward_backward([rows])
            with Traffic() as traffic:
                backend.forward_backward([rows])
    finally:
        torch.set_num_threads(threads)
    tokens = case.tokens
    return {kind: (c.operations, c.bytes / tokens, c.flops / tokens) for kind, c in traffic.of.items()}


FEW, MANY = 1, 2  # layers


def of_layer(name: str, length: int, tenants: int = 1) -> dict[Kind, list[float]]:
    """What one more layer adds: operations, bytes and FLOPs a token."""
    few, many = counted(name, FEW, length, tenants), counted(name, MANY, length, tenants)
    return {
        kind: [(b - a) / (MANY - FEW) for a, b in zip(few[kind], many[kind], strict=True)] for kind in few
    }


def of_layer_by(formula: Callable[[Shape], float], name: str) -> float:
    few, many = (formula(Shape.of(name, narrow(name, layers))) for layers in (FEW, MANY))
    return (many - few) / (MANY - FEW)


@pytest.mark.parametrize("tenants", [1, 4])
def test_linear_layers_and_their_terms(tenants: int) -> None:
    found = of_layer("qwen3", 256 // tenants, tenants)
    flops = of_layer_by(lambda s: reckon_gpu.linear_flops(s, RANK * s.widths), "qwen3")
    assert found["products"][2] == pytest.approx(flops, rel=2e-3), "but for the norms' few weights"
    moved = of_layer_by(reckon_gpu.product_bytes, "qwen3")
    weights = 2 * 2 * of_layer_by(lambda s: s.work.weights, "qwen3") / 256
    assert found["products"][1] == pytest.approx(moved + weights, rel=0.1)


@pytest.mark.parametrize(("name", "length"), [("qwen3", 256), ("qwen3_5", 256), ("qwen3_5", 512)])
def test_all_else(name: str, length: int) -> None:
    found = of_layer(name, length)
    moved = of_layer_by(lambda s: reckon_gpu.other_bytes(s, Levers(), length), name)
    assert LOWEST < found["other"][1] / moved < HIGHEST
    operations = of_layer_by(lambda s: reckon_gpu.operations(s, Levers(), length), name)
    assert LOWEST < sum(count[0] for count in found.values()) / operations < HIGHEST


def test_a_step_is_its_parts_and_each_improvement_is_one() -> None:
    shape = Shape.of("qwen3", narrow("qwen3", 2))
    rates, step = Rates(), Step(tenants=2, rows=1, length=64, rank=RANK, micro_batch=128)
    numbers = RANK * shape.widths
    # By hand, with all that is assumed at 1: the layers' weights are all but the head's.
    ones = Rates(1.0, 1.0, 1.0, 1.0, 0.0)
    parts = reckon_gpu.seconds_by_part(shape, step, Levers(), ones)
    weights = 2 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 768 + 2 * 256 + 2 * 64) + 256
    assert parts["linear layers"] == pytest.approx(128 * 4 * weights / 0.75)
    assert parts["attention"] == 128 * 7 * 2 * 65 * 256
    assert numbers == 8 * 2 * (4 * 256 + 256 + 2 * 128 + 256 + 256 - 256 + 3 * (256 + 768))
    seconds = [
        sum(reckon_gpu.seconds_by_part(shape, step, levers, rates).values())
        for _, levers in reckon_gpu.stages(shape)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_the_page_is_what_is_reckoned() -> None:
    results = Path(reckon_gpu.__file__).parent / "results"
    assert (results / "2026-12-01-gpu-reckoned.md").read_text(encoding="utf-8") == reckon_gpu.page()
