"""The random models that `multi_lora_step.py` and `bare_loop.py` train, made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3Config

VOCAB_SIZE = 2048
# All linear layers of these models, by PEFT's names; those that a model lacks are passed over.
LORA_LAYERS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    "lm_head",
]

_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
# Width of SmolLM2-135M: here a step's time is that of its products.
_WIDE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
SIZES: dict[str, dict[str, Any]] = {"tiny": _TINY, "small": _SMALL, "wide": _WIDE}
# Of Qwen3.5 beside those: three layers of linear attention before each of full attention. As in Qwen3.5-4B there are
# two value heads to a key head, and the values are about 1.7 times as wide as the model.
_LINEAR: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "small": {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "wide": {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
_LINEAR_HEADS: dict[str, Any] = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
ARCHITECTURES = ("qwen3", "qwen3.5")


def save_model(directory: Path, architecture: str, size: str) -> None:
    """
    Args:
        architecture: one of ARCHITECTURES.
        size: one of SIZES.
    """
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    if architecture == "qwen3":
        config = Qwen3Config(**SIZES[size], **shared)
    else:
        config = Qwen3_5TextConfig(**(SIZES[size] | _LINEAR[size]), **_LINEAR_HEADS, **shared)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
