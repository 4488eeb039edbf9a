"""Tiny models whose layers keep something else than keys and values of all tokens, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_models
import transformers

VOCAB = 512
WINDOW = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
WIDE: dict[str, Any] = SIZES | {"head_dim": 16}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

CONFIGS: dict[str, Callable[[], Any]] = {
    # Gated delta nets: a convolution and a recurrence.
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**WIDE, **DELTA),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**WIDE, **DELTA, **EXPERTS),
    # Without experts, so that an adapter can be added to the weights: PEFT 0.21 reads this class's otherwise.
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **WIDE, **DELTA, **EXPERTS, mlp_only_layers=[0, 1, 2, 3]
    ),
    # Windows.
    "gemma3": lambda: transformers.Gemma3TextConfig(**WIDE, sliding_window=WINDOW, layer_types=ALTERNATING),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **WIDE, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "mistral": lambda: transformers.MistralConfig(**WIDE, sliding_window=WINDOW),
    # A Mamba-2 mixer in some layers; and beside attention in each.
    "bamba": lambda: transformers.BambaConfig(**SIZES, **MAMBA_2, attn_layer_indices=[1]),
    "falcon_h1": lambda: transformers.FalconH1Config(**WIDE, **MAMBA_2, mamba_d_ssm=128),
    # A Mamba-1 mixer, which reads a prompt whole.
    "jamba": lambda: transformers.JambaConfig(
        **SIZES,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
    ),
    # Convolutions alone.
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2),
}


def save(name: str, directory: Path) -> Path:
    """One of CONFIGS."""
    return random_models.save(CONFIGS[name](), directory)
