"""Models of all kinds are sampled in a batch that they take, or refused in words before anyone waits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import torch
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    BloomConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    MiniMaxConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3Config,
)

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine
from twinkle.server.samplers.transformers.batches import SlotBatch
from twinkle.server.samplers.transformers.equal_length import EqualLengthBatch

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FIVE_LAYERS: dict[str, Any] = {**SIZES, "num_hidden_layers": 5}


def save(config: PretrainedConfig, directory: Path) -> ModelConfig:
    return ModelConfig(random_models.save(config, directory), max_context_length=64)


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        (Qwen3Config(**SIZES), SlotBatch),
        # It makes its own mask of the one that it is given, and takes no positions.
        (
            BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1),
            EqualLengthBatch,
        ),
        # It has a size for each layer.
        (
            Gemma3nTextConfig(
                **FIVE_LAYERS,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=128,
                num_kv_shared_layers=0,
                laurel_rank=4,
                sliding_window=8,
                activation_sparsity_pattern=[0.0] * 5,
            ),
            SlotBatch,
        ),
        # Its heads are wider in some layers than in others.
        (
            Gemma4TextConfig(
                **SIZES,
                layer_types=["sliding_attention", "full_attention"],
                sliding_window=8,
                global_head_dim=16,  # pyright: ignore[reportCallIssue]
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=128,
                num_kv_shared_layers=0,
            ),
            SlotBatch,
        ),
        # Its routers are linear layers by their class, and give two tensors.
        (PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), SlotBatch),
    ],
    ids=["Qwen3", "Bloom", "Gemma 3n", "Gemma 4", "Phi-3.5-MoE"],
)
def test_it_is_sampled_with_the_numbers_of_the_plain_model(
    config: PretrainedConfig, batch: type, tmp_path: Path
) -> None:
    model = save(config, tmp_path)
    engine = TransformersEngine.create(model, TransformersBackend(model))
    try:
        assert type(engine._loop.running.batch) is batch
        prompt = np.array([5, 6, 7, 8], np.int64)
        request = GenerateRequest("r", None, prompt, SamplingParams(max_tokens=6, seed=1, stop=[]))
        [sequence] = engine.generate(request).result(60).sequences
    finally:
        engine.close()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([[*prompt.tolist(), *sequence.tokens]])
    with torch.no_grad():
        logprobs = plain(tokens, use_cache=False).logits[0].log_softmax(-1)
    expected = [logprobs[3 + i, token].item() for i, token in enumerate(sequence.tokens)]
    assert sequence.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_model_with_a_cache_of_its_own_is_refused_in_words(tmp_path: Path) -> None:
    config = MiniMaxConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, block_size=16)
    model = save(config, tmp_path)
    loaded = load_base_model(model)
    with pytest.raises(InvalidRequest, match="MiniMaxForCausalLM can't be sampled here: .* cache of its own"):
        TransformersEngine.create(model, TransformersBackend(model, loaded))


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    config = BertGenerationConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    with pytest.raises(InvalidRequest, match="is not causal"):
        load_base_model(save(config, tmp_path))
