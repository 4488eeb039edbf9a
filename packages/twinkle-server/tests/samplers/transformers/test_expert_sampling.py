"""Sampling with adapters that have terms on routed experts: the numbers are the trainer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import tiny_moe
from transformers import Qwen2MoeConfig, Qwen3_5MoeTextConfig

from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.contract.parts import train
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

SPECS = {
    "small": AdapterSpec(rank=4, seed=1),
    "other": AdapterSpec(rank=4, seed=2),
    "large": AdapterSpec(rank=9, seed=3, alpha=8, train_unembed=False),
    "attention": AdapterSpec(rank=4, seed=4, train_mlp=False),
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}

MODELS: dict[str, Any] = {
    "Qwen3-MoE": None,
    "shared expert": Qwen2MoeConfig(**tiny_moe.SIZES, **EXPERTS, shared_expert_intermediate_size=24),
    "hybrid, one request at a time": Qwen3_5MoeTextConfig(
        **tiny_moe.SIZES,
        **EXPERTS,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_sampled_and_prompt_logprobs_are_those_of_the_trainer(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    path = tiny_moe.save(tmp_path) if config is None else random_models.save(config, tmp_path)
    backend = TransformersBackend(ModelConfig(path))
    assert any(".experts." in target for target in backend.loaded.targets)
    engine = TransformersEngine(backend.loaded, ModelConfig(path), max_rows=8)
    try:
        for who, spec in SPECS.items():
            backend.add_adapter(who, spec)
            train(backend, who)
            engine.add_adapter(who, backend.export_adapter(who, with_optimizer=False))
        draw = np.random.default_rng(0)
        cases = [(who, draw.integers(0, 100, draw.integers(2, 30))) for who in (*SPECS, *SPECS, "small")]
        params = SamplingParams(max_tokens=9, stop=[], seed=7, temperature=1.0)
        pending = [
            engine.generate(GenerateRequest("t", who, prompt, params, num_samples=2, prompt_logprobs=True))
            for who, prompt in cases
        ]
        for (who, prompt), future in zip(cases, pending, strict=True):
            response = future.result(60)
            for sequence in response.sequences:
                found: Any = [*(response.prompt_logprobs or [])[1:], *(sequence.logprobs or [])]
                whole = np.array([*prompt, *sequence.tokens], np.int64)
                np.testing.assert_allclose(found, trainer_logprobs(backend, who, whole), atol=1e-4)
    finally:
        engine.close()


def trainer_logprobs(backend: TransformersBackend, who: str, tokens: np.ndarray) -> np.ndarray:
    """Of each token after the first."""
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
    row = Row(who, tokens[:-1], "cross_entropy", inputs, forward_only=True)
    [[result]] = backend.forward_backward([[row]])
    return result.logprobs
