"""Tiny models whose rope depends on the length of a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhimoeConfig

ORIGINAL = 32
CONTEXT = 128
VOCAB = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# One for each of the head's eight pairs. They are far apart, so that the wrong ones show.
_FACTORS: dict[str, Any] = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0],
    "original_max_position_embeddings": ORIGINAL,
}

_WINDOWS = {"phi3": CONTEXT, "phi3-window": 64}


def make(directory: Path, kind: str) -> Path:
    """A random model: "phi3" (as published: with a window that is as long as the context), "phi3-window" (a shorter
    one), "phimoe" (which scales by length as well), or "dynamic".
    """
    torch.manual_seed(3)
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, **_FACTORS}
    if kind in _WINDOWS:
        config = Phi3Config(
            **_SIZES,
            original_max_position_embeddings=ORIGINAL,
            rope_parameters=scaling,
            sliding_window=_WINDOWS[kind],
        )
    elif kind == "phimoe":
        mscales = {"short_mscale": 1.1, "long_mscale": 1.4}
        config = PhimoeConfig(
            **_SIZES, rope_parameters={**scaling, **mscales}, sliding_window=None, num_local_experts=2
        )
    else:
        config = LlamaConfig(
            **_SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        )
    model = AutoModelForCausalLM.from_config(config)
    # Larger than a new model's weights, so that attention looks at something.
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
            parameter.data.mul_(15)
    model.save_pretrained(directory)
    return directory
