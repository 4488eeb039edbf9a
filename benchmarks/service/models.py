"""Models in the shapes that are measured, with random weights: speed needs no trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

MODELS = {
    # Small enough that what is measured is everything but arithmetic.
    "tiny": Qwen3Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=None,  # its embedding would be zeros, and the gradients of rows with it not finite
        tie_word_embeddings=True,
    ),
    # HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        eos_token_id=None,
        pad_token_id=None,  # its embedding would be zeros, and the gradients of rows with it not finite
        tie_word_embeddings=True,
    ),
}


def make_model(name: str, directory: Path) -> Path:
    """The same random weights each time, in float32."""
    path = directory / name
    if not (path / "config.json").is_file():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).save_pretrained(path)
    return path
