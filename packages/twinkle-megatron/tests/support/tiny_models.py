"""Tiny models with random weights, of each family that has a weight map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

# An odd vocabulary: two ranks can't share it out evenly.
VOCAB_SIZE = 131

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_MIXTURE: dict[str, Any] = {
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# Of each head four features are rotated; two value heads share a key head. A gated delta net's first outputs may be
# near zero: with Qwen3.5's own epsilon its norm would make float32's rounding visible.
_HYBRID: dict[str, Any] = {
    "rms_norm_eps": 1e-3,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
_SHARED_EXPERT: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 24,
}
_EYES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 4,
}


def _seeing(config: Any, tied: bool = False, **text: Any) -> PretrainedConfig:
    """As published: a text model beside one for images."""
    text = {**SIZES, **_HYBRID, **text, "tie_word_embeddings": tied}
    return config(text_config=text, vision_config=_EYES, tie_word_embeddings=tied)


CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **_MIXTURE),
    "qwen3_moe, first layer dense": lambda: Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 4}, **_MIXTURE, mlp_only_layers=[0]
    ),
    "qwen3_5": lambda: _seeing(Qwen3_5Config),
    "qwen3_5, tied": lambda: _seeing(Qwen3_5Config, tied=True),
    "qwen3_5_moe": lambda: _seeing(Qwen3_5MoeConfig, **_SHARED_EXPERT),
    "qwen3_next": lambda: Qwen3NextConfig(**SIZES, **_HYBRID, **_SHARED_EXPERT, mlp_only_layers=[1]),
}


def save(family: str, directory: Path) -> Path:
    return save_random(CONFIGS[family](), directory)


def save_random(config: PretrainedConfig, directory: Path) -> Path:
    """Biases and norms are random too: as they are initialised they would prove nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
            if name.endswith(
                "dt_bias"
            ):  # as it is initialised, linear attention forgets all but the last token
                parameter.data.sub_(5.0)
        model.save_pretrained(directory)
    return directory
