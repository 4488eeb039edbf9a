"""This rank's part of the base model with LoRA layers in it, ready for passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn
from transformers import GenerationConfig

from twinkle.server.backends.hf.device_memory import MemoryAccount
from twinkle.server.backends.hf.export_facts import export_facts
from twinkle.server.backends.hf.model_facts import (
    bounded_batch_tokens,
    context_length,
    eos_token_ids,
)
from twinkle.server.backends.lora.module_groups import groups_there_are
from twinkle.server.backends.protocol import BaseModelInfo, ModelConfig
from twinkle_megatron import architecture as architectures
from twinkle_megatron import bridge_weights, build, groups, joins, weights
from twinkle_megatron.architecture import Architecture
from twinkle_megatron.groups import Groups
from twinkle_megatron.head import LogprobHead
from twinkle_megatron.joins import Join, side_by_side
from twinkle_megatron.lora import ColumnLora, ForwardContext, Parallelism, RowLora
from twinkle_megatron.recomputation import recompute_layers, stage_affordable_tokens, stage_token_bytes
from twinkle_megatron.shards import Target, targets


@dataclass(frozen=True, eq=False)
class Stage:
    """What a rank holds.

    Attributes:
        model: gives log-probabilities [rows, tokens, k] at `context.targets` on the last stage, else hidden states.
        targets: the layers of the whole model that adapters can act on.
        affordable_tokens: with more tokens at once this stage's layers recompute their activations, if no adapter took
            any memory.
        token_bytes: of a token's activations in this stage's layers.
    """

    architecture: Architecture
    groups: Groups
    model: GPTModel
    context: ForwardContext
    targets: list[Target]
    info: BaseModelInfo
    affordable_tokens: int
    token_bytes: int


def load(config: ModelConfig) -> Stage:
    """Meet the other ranks and read this rank's part of the weights. Once per process.

    Raises:
        InvalidRequest: if the model can't be loaded as configured; on all ranks alike.
    """
    hf = architectures.read_hf_config(config)
    architecture = architectures.describe(hf, config)
    context_length(architecture.hf, config)  # first, since it may refuse
    ranks = groups.join(config)
    model = build.build(architecture, ranks)
    read = bridge_weights.load if architecture.is_bridged else weights.load
    read(model, config.path, architecture, ranks)
    context = ForwardContext()
    _add_lora(model, architecture, ranks, context)
    recompute_layers(cast("Any", model).decoder.layers, context)
    memory = MemoryAccount.of(config, ranks.device)
    token_bytes = stage_token_bytes(architecture, ranks)
    affordable = stage_affordable_tokens(architecture, token_bytes, memory.passes, ranks)
    found = targets(architecture)
    info = _describe(architecture, config, found, affordable, memory)
    return Stage(architecture, ranks, model, context, found, info, affordable, token_bytes)


def _describe(
    architecture: Architecture,
    config: ModelConfig,
    found: list[Target],
    affordable: int,
    memory: MemoryAccount,
) -> BaseModelInfo:
    """
    Args:
        found: what adapters can act on.
        affordable: tokens whose activations of one stage's layers fit in a rank's memory.
    """
    hf, device = architecture.hf, torch.device(config.device)
    has_generation = (config.path / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(str(config.path)) if has_generation else None
    return BaseModelInfo(
        vocab_size=architecture.vocab_size,
        max_context_length=context_length(hf, config),
        max_lora_rank=config.max_lora_rank,
        # The first stage holds as many micro-batches as there are stages.
        max_batch_tokens=bounded_batch_tokens(affordable // config.pipeline_parallel_size, device),
        eos_token_ids=eos_token_ids(generation, hf),
        architecture=architecture.name,
        export=export_facts(config.path, architecture.is_tied),
        # Ranks that share a stage's experts have copies of everything else, and so add no room.
        max_adapter_bytes=memory.adapters * config.tensor_parallel_size * config.pipeline_parallel_size,
        trainable=groups_there_are(target.group for target in found),
    )


def _add_lora(model: GPTModel, architecture: Architecture, groups: Groups, context: ForwardContext) -> None:
    tree = cast("Any", model)
    parallelism = Parallelism(groups.tensor, bool(architecture.config.sequence_parallel))
    first = build.first_layer(architecture, groups)
    heads = joins.of_attention(architecture, groups)
    delta_net = joins.of_delta_net(architecture, groups)

    def column(base: nn.Module, within: str, names: Sequence[str], join: Join) -> ColumnLora:
        return ColumnLora(base, [f"{within}.{name}" for name in names], join, context, parallelism)

    def row(base: nn.Module, name: str) -> RowLora:
        return RowLora(base, name, context, parallelism)

    for i, layer in enumerate(tree.decoder.layers):
        prefix, own = f"model.layers.{first + i}.", layer.self_attention
        if first + i in architecture.linear_layers:
            name = f"{prefix}linear_attn"
            own.in_proj = column(own.in_proj, name, joins.delta_net_layers(architecture.hf), delta_net)
            own.out_proj = row(own.out_proj, f"{name}.out_proj")
        else:
            name = f"{prefix}self_attn"
            own.linear_qkv = column(own.linear_qkv, name, ("q_proj", "k_proj", "v_proj"), heads)
            own.linear_proj = row(own.linear_proj, f"{name}.o_proj")
        name, dense = f"{prefix}mlp", layer.mlp
        if first + i in architecture.expert_layers:
            dense.attach(f"{name}.experts", context)
            if dense.shared is None:
                continue
            name, dense = f"{name}.shared_expert", dense.shared.mlp
        dense.linear_fc1 = column(dense.linear_fc1, name, ("gate_proj", "up_proj"), side_by_side)
        dense.linear_fc2 = row(dense.linear_fc2, f"{name}.down_proj")
    if groups.is_first_stage:
        # The embedding is frozen, but what follows must pass gradients to the first layers' matrices, on all ranks
        # alike, whatever the adapters act on.
        tree.embedding.register_forward_hook(_require_grad)
    if groups.is_last_stage:
        tree.output_layer = LogprobHead(tree.output_layer, architecture.vocab_size, context, parallelism)


def _require_grad(_module: nn.Module, _inputs: object, hidden: Tensor) -> Tensor:
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden
