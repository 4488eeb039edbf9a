"""In which order a layer of Megatron-Core's holds several of the model's own, by their names in Transformers.

The weights are put together by it when they are read, and the adapters' terms in each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig

from twinkle_megatron.architecture import Architecture, head_size
from twinkle_megatron.groups import Groups

# A rank's outputs of the model's layers, [..., own features] each, to those of the layer that holds them.
Join: TypeAlias = Callable[[list[Tensor]], Tensor]


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[..., n_i] each to [..., sum of n_i]."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def of_attention(architecture: Architecture, groups: Groups) -> Join:
    """For `q_proj`, `k_proj` and `v_proj`: each group of heads has its q, their output gates if any, its k and
    its v.
    """
    here = (architecture.config.num_query_groups or 1) // groups.tensor.size
    size, is_gated = head_size(architecture.hf), architecture.config.attention_output_gate

    def join(parts: list[Tensor]) -> Tensor:
        q, k, v = (part.unflatten(-1, (here, -1)) for part in parts)
        if is_gated:  # in the model each head's gate follows it
            q = q.unflatten(-1, (-1, 2, size)).transpose(-3, -2).flatten(-3)
        return torch.cat([q, k, v], dim=-1).flatten(-2)

    return join


def delta_net_layers(hf: PretrainedConfig) -> tuple[str, ...]:
    """What makes q, k, v, z, b and a of a gated delta net, in the order of the module tree."""
    if has_key_head_order(hf):
        return "in_proj_qkvz", "in_proj_ba"
    return "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"


def of_delta_net(architecture: Architecture, groups: Groups) -> Join:
    """For `delta_net_layers`: all heads' q, then all heads' k, v, z, b and a."""
    hf = architecture.hf
    if not has_key_head_order(hf):
        return side_by_side
    here = hf.linear_num_key_heads // groups.tensor.size
    values = hf.linear_num_value_heads // hf.linear_num_key_heads  # to a key head
    keys, features = hf.linear_key_head_dim, values * hf.linear_value_head_dim

    def join(parts: list[Tensor]) -> Tensor:
        qkvz, ba = (part.unflatten(-1, (here, -1)) for part in parts)
        by_kind = (*qkvz.split([keys, keys, features, features], dim=-1), *ba.chunk(2, dim=-1))
        return torch.cat([part.flatten(-2) for part in by_kind], dim=-1)

    return join


def has_key_head_order(hf: PretrainedConfig) -> bool:
    """Whether the model has for each key head its q, k, v and z behind each other, as Qwen3-Next, or all q first."""
    return hf.model_type == "qwen3_next"
