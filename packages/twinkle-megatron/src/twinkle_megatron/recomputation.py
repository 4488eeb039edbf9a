"""What a pass keeps for its backward pass; recomputed, layer by layer, if memory is short.

Only each layer's input is kept then, and its forward pass runs again for its gradient (Chen et al. 2016,
arXiv:1604.06174). All ranks of a stage decide alike, as their layers exchange tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from twinkle.server.backends.hf.model_facts import affordable_tokens, estimated_token_bytes
from twinkle_megatron import delta_net
from twinkle_megatron.architecture import Architecture
from twinkle_megatron.groups import Groups
from twinkle_megatron.lora import ForwardContext


def stage_affordable_tokens(architecture: Architecture, groups: Groups) -> int:
    """Tokens whose activations of one stage's layers fit in the memory beside the weights, on each of the ranks.

    Call it when the weights are there; all ranks call it together.
    """
    layers = architecture.config.num_layers // groups.pipeline.size
    bytes_each = estimated_token_bytes(architecture.hf, architecture.config.params_dtype, layers)
    if architecture.config.sequence_parallel:
        bytes_each //= groups.tensor.size
    if architecture.linear_layers:
        bytes_each += layers * delta_net.token_bytes(architecture.hf) // groups.tensor.size
    affordable = affordable_tokens(bytes_each, int(architecture.hf.vocab_size), groups.device)
    found = torch.tensor([affordable], device=groups.device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=groups.world.ranks)
    return int(found.item())


def recompute_layers(layers: nn.ModuleList, context: ForwardContext) -> None:
    """Make the layers recompute their activations in the backward pass while `context.recomputes`."""
    for layer in layers:
        layer.forward = _recomputed(layer.forward, context)


def _recomputed(forward: Callable[..., Any], context: ForwardContext) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (context.recomputes and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        segments = context.segments

        def compute(*args: Any, **kwargs: Any) -> Any:
            # In the backward pass another piece may be the current one.
            current, context.segments = context.segments, segments
            try:
                return forward(*args, **kwargs)
            finally:
                context.segments = current

        # Stopping early would leave out messages at the layer's end that other ranks may wait for.
        with set_checkpoint_early_stop(False):
            return cast("Any", checkpoint)(
                compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

    return run
