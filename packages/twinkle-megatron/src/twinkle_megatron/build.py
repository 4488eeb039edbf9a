"""This rank's part of the base model, as Megatron-Core's `GPTModel`, without its weights, which `weights` reads."""

from __future__ import annotations

import importlib
import logging
from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import PretrainedConfig

from twinkle.protocol.errors import InvalidRequest
from twinkle_megatron.architecture import Architecture
from twinkle_megatron.delta_net import GatedDeltaNet
from twinkle_megatron.experts import RoutedExperts
from twinkle_megatron.groups import Groups
from twinkle_megatron.layers import CausalAttention, GatedAttention, RMSNorm, ZeroCenteredRMSNorm

# It warns about a feed-forward part that is not its own, once per layer.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)

# By the text model's type, the family in Transformers and the name that its classes begin with.
_ROTARY = {
    "qwen3_next": ("qwen3_next", "Qwen3Next"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5Text"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeText"),
}


def build(architecture: Architecture, groups: Groups) -> GPTModel:
    """The embedding on the first stage, this stage's layers, the output head on the last stage. All frozen.

    Raises:
        InvalidRequest: if the position encoding is not supported here.
    """
    config = architecture.config
    frequencies = _rotary_frequencies(architecture.hf)  # first, since it may refuse
    with torch.device(groups.device):
        model = GPTModel(
            config,
            cast("ModuleSpec", _stage(architecture, groups)),
            vocab_size=architecture.padded_vocab_size,
            max_sequence_length=int(architecture.hf.max_position_embeddings),
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            parallel_output=True,
            # A head tied to the embedding gets its weights from `weights`; Megatron-Core's way is for training it.
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
    cast("Any", model).rotary_pos_emb.inv_freq = frequencies.to(groups.device)
    model.requires_grad_(False)
    model.eval()
    return model


def first_layer(architecture: Architecture, groups: Groups) -> int:
    """Number of this stage's first layer in the whole model, counted from 0."""
    return groups.pipeline.index * (architecture.config.num_layers // groups.pipeline.size)


def _stage(architecture: Architecture, groups: Groups) -> TransformerBlockSubmodules:
    start = first_layer(architecture, groups)
    count = architecture.config.num_layers // groups.pipeline.size
    layers = [_layer(architecture, groups, number) for number in range(start, start + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=cast("Any", _norm(architecture)))


def _norm(architecture: Architecture) -> type[RMSNorm]:
    return ZeroCenteredRMSNorm if architecture.has_zero_centered_norms else RMSNorm


def _layer(architecture: Architecture, groups: Groups, number: int) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=architecture.has_qk_norm, normalization="RMSNorm")
    parts, norm = cast("Any", spec.submodules), _norm(architecture)
    here = {"hf": architecture.hf, "groups": groups}
    parts.input_layernorm = norm
    parts.pre_mlp_layernorm = norm
    if number in architecture.linear_layers:
        parts.self_attention = ModuleSpec(module=GatedDeltaNet, params=here)
    else:
        attention = parts.self_attention.submodules
        attention.core_attention = CausalAttention
        if architecture.has_qk_norm:
            attention.q_layernorm = attention.k_layernorm = norm
        if architecture.config.attention_output_gate:
            parts.self_attention.module = GatedAttention
    if number in architecture.expert_layers:
        parts.mlp = ModuleSpec(module=RoutedExperts, params={**here, "dense": parts.mlp})
    return spec


def _rotary_frequencies(hf: PretrainedConfig) -> torch.Tensor:
    """float32 [rotated features of a head / 2], as in Transformers, for kinds of scaling that change only the angles.

    Qwen3.5 rotates a part of each head; its angles in three directions are the same for text.
    """
    family, name = _ROTARY.get(hf.model_type, ("llama", "Llama"))  # the others' are Llama's
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(modeling, f"{name}RotaryEmbedding")(hf)
    if rotary.attention_scaling != 1.0 or rotary.rope_type in ("dynamic", "longrope"):
        raise InvalidRequest(
            f"model: positions scaled as {rotary.rope_type!r} are not known to the Megatron backend; "
            "set use_megatron: false"
        )
    return rotary.inv_freq.detach().clone().float()
