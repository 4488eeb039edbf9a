"""What a training pass keeps for its backward pass: measured, and recomputed if memory is short.

Recomputation is by decoder layer: only each layer's input is kept, and its forward pass runs again for its gradient
(Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

# Tokens of a probe's row: on a GPU, enough that the allocator's rounding doesn't matter.
_CPU_PROBE_TOKENS = 16
_GPU_PROBE_TOKENS = 256


@dataclass(eq=False)
class Recomputation:
    """Whether a module tree's layers recompute their activations; set by the one thread that computes."""

    is_on: bool = False


def recompute_layers(body: nn.Module, recomputation: Recomputation) -> None:
    """Make the decoder layers of `body` recompute their activations in the backward pass while that is on."""
    for layer in body.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _recomputed(layer.forward, recomputation)


def _recomputed(forward: Callable[..., Any], recomputation: Recomputation) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if recomputation.is_on and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    return run


@dataclass(eq=False)
class SavedBytes:
    """Counts what autograd keeps while `hooks` is entered: bytes of distinct storages, including weights."""

    storages: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Not its address: where weights are gathered layer by layer, several have the same one after each other.
        self.storages[storage._cdata] = storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        return tensor


def token_bytes(run: Callable[[Tensor], Tensor], layers: int, device: torch.device) -> float:
    """Memory that one more token costs a training pass, in bytes: measured with one more row, in a pass of two.

    Args:
        run: token ids [rows, tokens] to hidden states, with a graph.
        layers: number of decoder layers. The backward pass holds gradients of one layer's activations at a time,
            assumed to be as large as what the layer keeps.
    """
    tokens = _GPU_PROBE_TOKENS if device.type == "cuda" else _CPU_PROBE_TOKENS
    one, two = (_probe(run, torch.zeros(rows, tokens, dtype=torch.int64, device=device)) for rows in (1, 2))
    kept = (two.kept - one.kept) / tokens
    return max(kept + kept / layers, (two.peak - one.peak) / tokens)


@dataclass(frozen=True)
class _Probe:
    """Bytes: kept for the backward pass, and the allocator's peak (0 if unknown)."""

    kept: int
    peak: int


def _probe(run: Callable[[Tensor], Tensor], tokens: Tensor) -> _Probe:
    is_gpu = tokens.device.type == "cuda"
    before = 0
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(tokens.device)
        before = torch.cuda.memory_allocated(tokens.device)
    saved = SavedBytes()
    with saved.hooks:
        hidden = run(tokens)
    hidden.sum().backward()
    return _Probe(saved.total, torch.cuda.max_memory_allocated(tokens.device) - before if is_gpu else 0)
