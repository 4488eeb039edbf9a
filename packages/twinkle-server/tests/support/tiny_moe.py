"""A tiny mixture of experts with random weights."""

from pathlib import Path
from typing import Any

import random_models
from transformers import Qwen3MoeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}


def save(directory: Path) -> Path:
    """A Qwen3-MoE of 2 layers, 4 experts, of which a token goes to 2."""
    return random_models.save(Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2), directory)
