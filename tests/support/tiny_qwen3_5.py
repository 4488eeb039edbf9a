"""Tiny Qwen3.5 checkpoints with random weights, laid out as Qwen3.5 is published.

The class in config.json is `Qwen3_5ForConditionalGeneration` (or its mixture of experts), with a text and a vision
configuration; the text model's weights are `model.language_model.*`, the vision tower's `model.visual.*`, and `mtp.*`
belongs to the layer that predicts a further token, which Transformers leaves out. As in the real model three layers of
linear attention (gated delta nets) go before one of full attention (by default), queries are gated, a quarter of each
head is rotated, and a mixture has a shared expert beside the routed ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS = 4
EXPERTS = 4


def save(
    directory: Path,
    vocab_size: int,
    eos_token_id: int,
    context_length: int,
    *,
    experts: bool = False,
    tied: bool = False,
    tensor_parallel_size: int = 2,
    layers: int = LAYERS,
    head_dim: int = 16,
) -> Path:
    """Write config.json and model.safetensors, in float32; the same weights each time.

    Args:
        experts: a mixture of 4 routed experts, 2 for each token, and a shared one, in place of the dense layers.
        tied: the output head is the embedding.
        tensor_parallel_size: the largest that heads can be shared out by: the number of key heads of both kinds of
            attention.
        layers: the last is of full attention, the others are of linear attention.
        head_dim: of both kinds of attention; a multiple of 16.
    """
    import torch
    import transformers

    kind = "Qwen3_5Moe" if experts else "Qwen3_5"
    config = getattr(transformers, f"{kind}Config")(
        text_config=_text(
            vocab_size,
            eos_token_id,
            context_length,
            experts,
            tied,
            tensor_parallel_size,
            layers,
            head_dim,
        ),
        vision_config=_VISION,
        tie_word_embeddings=tied,
        # The last tokens of the vocabulary; the real ones are at its end, too.
        **{name: vocab_size - 1 - i for i, name in enumerate(_VISION_TOKENS)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(
            config, dtype=torch.float32
        )
    made.save_pretrained(directory)
    _lay_out_as_published(directory, layers)
    return directory


def _text(
    vocab_size: int,
    eos_token_id: int,
    context_length: int,
    experts: bool,
    tied: bool,
    tensor_parallel_size: int,
    layers: int,
    head_dim: int,
) -> dict[str, Any]:
    heads = tensor_parallel_size
    pairs = head_dim // 8  # a quarter of a head is rotated
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"],
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        # Time, height, width.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [pairs - pairs // 2, pairs // 2, 0],
        },
        # A gated delta net's outputs are normalised. Random weights leave some next to nothing: with the real 1e-6
        # gradients would be ten times as large, and so would float32's errors in them.
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": context_length,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
    }
    if experts:
        sizes |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
    return sizes


_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 4,
}
_VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _lay_out_as_published(directory: Path, layers: int) -> None:
    """Routed experts as one tensor for all of a layer, where Transformers saves one for each; and `mtp.*`."""
    import torch
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    for experts in sorted({name.rpartition(".experts.0.")[0] for name in tensors if ".experts.0." in name}):
        taken = {
            matrix: torch.stack(
                [tensors.pop(f"{experts}.experts.{i}.{matrix}.weight") for i in range(EXPERTS)]
            )
            for matrix in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{experts}.experts.gate_up_proj"] = torch.cat([taken["gate_proj"], taken["up_proj"]], dim=1)
        tensors[f"{experts}.experts.down_proj"] = taken["down_proj"]
    layer = f"model.language_model.layers.{layers - 1}."  # `mtp.*` is one of full attention, too
    tensors |= {
        name.replace(layer, "mtp.layers.0."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(layer)
    }
    norm = tensors["model.language_model.norm.weight"]
    for name in ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"):
        tensors[f"{name}.weight"] = norm.clone()
    tensors["mtp.fc.weight"] = torch.eye(len(norm)).repeat(1, 2)
    save_file(tensors, path, metadata={"format": "pt"})
