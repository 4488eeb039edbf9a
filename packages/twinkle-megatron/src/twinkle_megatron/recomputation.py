"""What a pass keeps for its backward pass; recomputed, layer by layer, if memory is short.

Only each layer's input is kept then, and its forward pass runs again for its gradient (Chen et al. 2016,
arXiv:1604.06174). All ranks of a stage decide alike, as their layers exchange tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from twinkle.server.backends.hf.model_facts import affordable_tokens, estimated_token_bytes, head_bytes
from twinkle.server.backends.lora.banks import Adapter
from twinkle_megatron import delta_net
from twinkle_megatron.architecture import Architecture
from twinkle_megatron.groups import Groups
from twinkle_megatron.lora import ForwardContext

if TYPE_CHECKING:
    from twinkle_megatron.stage import Stage


def stage_token_bytes(architecture: Architecture, groups: Groups) -> int:
    """Bytes that one more token costs a pass in one stage's layers, on each of the ranks."""
    layers = architecture.config.num_layers // groups.pipeline.size
    bytes_each = estimated_token_bytes(architecture.hf, architecture.config.params_dtype, layers)
    if architecture.config.sequence_parallel:
        bytes_each //= groups.tensor.size
    if architecture.linear_layers:
        bytes_each += layers * delta_net.token_bytes(architecture.hf) // groups.tensor.size
    return bytes_each


def stage_affordable_tokens(
    architecture: Architecture, token_bytes: int, pass_bytes: int, groups: Groups
) -> int:
    """Tokens whose activations of one stage's layers fit, on the rank that has room for the fewest; all ranks call it
    together.

    Args:
        pass_bytes: this rank's `MemoryAccount.passes`.
    """
    head = head_bytes(int(architecture.hf.vocab_size), groups.device)
    found = torch.tensor([affordable_tokens(token_bytes, pass_bytes, head)], device=groups.device)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=groups.world.ranks)
    return int(found.item())


def tokens_beside(adapters: Iterable[Adapter], stage: Stage, pieces: int) -> int:
    """Tokens whose activations fit beside what a pass holds of its adapters. The same on all ranks of a stage.

    Args:
        pieces: most that are under way at a time: each has a stack of the weights, and a copy of it in the dtype of the
            arithmetic.
    """
    itemsize = stage.architecture.config.params_dtype.itemsize
    held = sum(adapter.bank.layout.size * (4 + (4 + itemsize) * pieces) for adapter in adapters)
    return stage.affordable_tokens - held // stage.token_bytes


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
