"""Kinds of models on the pretended GPU, beside the same on the CPU: no tensor in the wrong place, the same numbers.

Not to the bit: on a GPU other code is used for experts, logits, and optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import tiny_qwen3_5
import torch
from pretended_cuda.counts import Counts
from torch.nn.functional import silu

from twinkle.protocol.types import AdamParams, SamplingParams
from twinkle.server.backends.lora.experts import ExpertTerm, run_experts
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

SPECS = {
    "one": AdapterSpec(rank=8, seed=1),
    "other": AdapterSpec(rank=8, seed=2),
    "wide": AdapterSpec(rank=16, seed=3, train_unembed=False),
}
LENGTHS = (("one", 9), ("other", 9), ("one", 5), ("wide", 70))
MODELS: dict[str, Callable[[Path], Path]] = {
    "hybrid": lambda directory: tiny_qwen3_5.save(directory, 128, 3, 256),
    "experts": tiny_moe.save,
    "hybrid with experts": lambda directory: tiny_qwen3_5.save(directory, 128, 3, 256, experts=True),
}
# Relative for losses and norms of gradients, absolute for log-probabilities.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


def rows() -> list[Row]:
    draw = np.random.default_rng(0)
    return [
        Row(
            who,
            draw.integers(5, 100, n),
            "cross_entropy",
            {"target_tokens": draw.integers(5, 100, n), "weights": np.ones(n, np.float32)},
        )
        for who, n in LENGTHS
    ]


def trained(backend: TransformersBackend) -> list[float]:
    """Losses and gradients' norms of two steps."""
    found: list[float] = []
    for who, spec in SPECS.items():
        backend.add_adapter(who, spec)
    for _ in range(2):
        found += [result.loss for result in backend.forward_backward([rows()])[0]]
        steps = [AdamStep(who, AdamParams(learning_rate=1e-3)) for who in SPECS]
        for outcome in backend.optim_step(steps):
            assert not isinstance(outcome, Exception), outcome
            found.append(outcome["grad_norm:mean"])
    return found


def sampled(backend: TransformersBackend, config: ModelConfig) -> list[float]:
    """Log-probabilities of prompts, and of samples of several adapters at once."""
    engine = TransformersEngine.create(config, backend)
    try:
        for who in SPECS:
            engine.add_adapter(who, backend.export_adapter(who, with_optimizer=False))
        futures = [
            engine.generate(
                GenerateRequest(
                    "tenant",
                    who,
                    np.arange(5, 12 + 3 * i),
                    SamplingParams(seed=i, max_tokens=4, stop=[]),
                    num_samples=2,
                    prompt_logprobs=True,
                )
            )
            for i, who in enumerate((None, *SPECS))
        ]
        found: list[float] = []
        for future in futures:
            response = future.result(200)
            assert all(len(sequence.tokens) == 4 for sequence in response.sequences)
            assert all(np.isfinite(sequence.logprobs or []).all() for sequence in response.sequences)
            found += [value for value in response.prompt_logprobs or () if value is not None]
        return found
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("hybrid", "float32"),
        ("hybrid", "bfloat16"),
        ("experts", "bfloat16"),
        ("hybrid with experts", "float32"),
    ],
)
def test_numbers_are_those_of_the_cpu(name: str, dtype: str, tmp_path: Path, device_counts: Counts) -> None:
    path = MODELS[name](tmp_path)
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        config = ModelConfig(path, dtype, device=device)
        backend = TransformersBackend(config)
        assert backend.loaded.device.type == device
        found[device] = trained(backend), sampled(backend, config)
        backend.close()
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(found["cuda"][0], found["cpu"][0], rtol=tolerance)
    np.testing.assert_allclose(found["cuda"][1], found["cpu"][1], atol=tolerance)
    if (name, dtype) == ("experts", "bfloat16"):
        assert device_counts.operations["_grouped_mm"], "experts by torch's grouped kernel"


def test_more_groups_of_experts_and_adapters_than_the_kernel_takes(device_counts: Counts) -> None:
    """128 experts with 8 adapters, of which each has few tokens."""
    draw = torch.Generator().manual_seed(0)
    experts, adapters, rank, hidden, tokens = 128, 8, 8, 16, 64

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(torch.bfloat16)

    gate_up, down = random(experts, 2 * hidden, hidden), random(experts, hidden, hidden)
    x, expert = random(tokens, hidden), torch.randint(0, experts, (tokens, 2), generator=draw)
    adapter = torch.randint(0, adapters, (tokens,), generator=draw)
    shapes = ((rank, hidden), (2 * hidden, rank), (rank, hidden), (hidden, rank))
    matrices = [random(adapters, experts, *shape) for shape in shapes]
    found: list[torch.Tensor] = []
    for device in ("cpu", "cuda"):
        term = ExpertTerm(None, adapter.to(device), *(matrix.to(device) for matrix in matrices))
        out = run_experts(x.to(device), expert.to(device), gate_up.to(device), down.to(device), silu, [term])
        found.append(out.float().cpu())
    assert device_counts.operations["_grouped_mm"]
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()
