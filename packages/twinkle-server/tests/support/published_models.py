"""Tiny checkpoints of classes that hold more than a text model, as they are published."""

from pathlib import Path
from typing import Any

import tiny_moe
import torch
import transformers

LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24}
EYES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 4,
}
GEMMA_EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# class of config.json: its configuration's class, whether the head is tied, text, vision
MODELS: dict[str, tuple[str, bool, dict[str, Any], dict[str, Any]]] = {
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5Config", False, LINEAR, EYES),
    "Qwen3_5ForConditionalGeneration, tied": ("Qwen3_5Config", True, LINEAR, EYES),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5MoeConfig", False, LINEAR | EXPERTS, EYES),
    "Gemma3ForConditionalGeneration": ("Gemma3Config", True, {}, GEMMA_EYES),
}


def save(name: str, directory: Path) -> Path:
    """One of MODELS, with random weights."""
    config, is_tied, text, vision = MODELS[name]
    tied = {"tie_word_embeddings": is_tied}
    settings = getattr(transformers, config)(
        text_config=tiny_moe.SIZES | text | tied,
        vision_config={"initializer_range": 0.2} | vision,
        mm_tokens_per_image=4,
        image_token_index=100,
        **tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        published = getattr(transformers, name.split(",")[0])._from_config(settings, dtype=torch.float32)
        published.save_pretrained(directory)
    return directory
