"""A stage that can't keep its activations recomputes them: the numbers are the same, and less is kept."""

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
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle_megatron.lora import ForwardContext, ShardSegment
from twinkle_megatron.recomputation import recompute_layers

TENANTS = {"a": AdapterSpec(rank=4, seed=1), "b": AdapterSpec(rank=2, seed=2)}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {"tensor_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3_5", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("qwen3_5_moe", {"expert_parallel_size": 2}),
    ],
)
def test_gradients_are_those_of_a_pass_that_keeps_everything(
    family: str, layout: dict[str, Any], model: Callable[[str], Path]
) -> None:
    """With two stages several pieces are under way, of different adapters."""
    rows = [peft_alone.random_row(who, 40 + k, k, VOCAB_SIZE) for k in range(4) for who in TENANTS]
    found: list[Any] = []
    for how in (megatron_ranks.load, megatron_ranks.load_short_of_memory):
        with megatron_ranks.start(ModelConfig(model(family), **layout), how) as group:
            backend = group.backend()
            for who, spec in TENANTS.items():
                backend.add_adapter(who, spec)
            [results] = backend.forward_backward([rows])
            states = [backend.export_adapter(who, False, with_gradients=True) for who in TENANTS]
            found.append((results, [state.gradients for state in states]))
            if how is megatron_ranks.load_short_of_memory:
                assert all(group.held_by_each_rank()), "each rank has recomputed"
    (kept, expected), (recomputed, gradients) = found
    for one, other in zip(kept, recomputed, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-6, atol=1e-6)
    for one, other in zip(expected, gradients, strict=True):
        assert_close(other, one, 1e-6)


class Squares(nn.Module):
    """Keeps each of its products; notes the segments that it is computed with."""

    def __init__(self, context: ForwardContext, seen: list[list[ShardSegment]]) -> None:
        super().__init__()
        self._context, self._seen = context, seen

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append(self._context.segments)
        for _ in range(3):
            x = x * x
        return x


def test_only_inputs_are_kept_and_the_piece_is_recomputed_with_its_own_segments() -> None:
    context, seen, kept = ForwardContext(), [], []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    layers = nn.ModuleList([Squares(context, seen)])
    recompute_layers(layers, context)
    segment = ShardSegment(1, 0, torch.zeros(0, dtype=torch.int64), {}, {})
    outputs: dict[bool, Tensor] = {}
    for context.recomputes in (False, True):
        kept.clear()
        seen.clear()
        x = torch.linspace(0.5, 1.5, 7, requires_grad=True)
        context.segments = [segment]
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = layers[0](x)
        later: list[ShardSegment] = []
        context.segments = later
        out.sum().backward()
        assert x.grad is not None
        outputs[context.recomputes] = x.grad
        assert all(segments == [segment] for segments in seen) and context.segments is later
        assert (len(seen), sum(kept)) == ((2, x.numel()) if context.recomputes else (1, 6 * x.numel()))
    torch.testing.assert_close(outputs[True], 8 * x.detach() ** 7)
    torch.testing.assert_close(outputs[True], outputs[False])
