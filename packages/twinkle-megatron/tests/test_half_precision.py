"""A frozen model in half precision with adapters in float32, across ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_ranks
import numpy as np
import peft_alone
import pytest
import torch
from tiny_models import VOCAB_SIZE

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig
from twinkle_megatron.lora import ShardSegment


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {"tensor_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3", {"pipeline_parallel_size": 2}),
        ("qwen3_moe", {"expert_parallel_size": 2}),
        ("qwen3_5", {"tensor_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3_5_moe", {"expert_parallel_size": 2}),
    ],
)
def test_losses_are_those_of_float32_but_for_rounding(
    family: str, layout: dict[str, Any], model: Callable[[str], Path]
) -> None:
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        with megatron_ranks.start(ModelConfig(model(family), torch_dtype=dtype, **layout)) as group:
            backend = group.backend()
            for i, who in enumerate("ab"):
                backend.add_adapter(who, AdapterSpec(rank=4, seed=i))
            rows = [peft_alone.random_row(who, 20, i, VOCAB_SIZE) for i, who in enumerate("abba")]
            for row in rows:
                np.abs(row.loss_inputs["weights"], out=row.loss_inputs["weights"])
            losses[dtype] = []
            for _ in range(4):
                [results] = backend.forward_backward([rows])
                losses[dtype].append(sum(result.loss for result in results))
                backend.optim_step([AdamStep(who, AdamParams(learning_rate=1e-2)) for who in "ab"])
            state = backend.export_adapter("a", with_optimizer=True)
            assert {matrix.dtype for matrix in state.weights.values()} == {np.dtype(np.float32)}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"][-1] < 0.9 * losses["bfloat16"][0]


def test_an_adapters_gradient_is_added_up_over_its_rows_in_float32() -> None:
    """Of 65 equal rows it is 65 times that of one, which mostly is no number of bfloat16."""
    rows = 65
    adapter_of_row = torch.cat([torch.zeros(rows, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, 16, generator=draw).requires_grad_()
    segment = ShardSegment(rows + 1, 2, adapter_of_row, {"layer": a}, {})
    x = torch.randn(5, 1, 16, generator=draw).bfloat16().expand(5, rows + 1, 16)
    segment.low("layer", x).backward(torch.ones(5, rows + 1, 4, dtype=torch.bfloat16))
    assert a.grad is not None
    torch.testing.assert_close(a.grad[0], rows * a.grad[1], rtol=1e-6, atol=0)
