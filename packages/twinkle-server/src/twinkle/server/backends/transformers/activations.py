"""What a training pass keeps for its backward pass: measured, and where memory asks for it computed again.

Recomputation is by decoder layer: of each only its input is kept, and its forward pass runs again when its gradient is
due (Chen et al. 2016, arXiv:1604.06174).
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

# Tokens of a probe's row: on a GPU, whose allocator rounds up, enough for that not to matter.
_CPU_PROBE_TOKENS = 16
_GPU_PROBE_TOKENS = 256


@dataclass(eq=False)
class Recomputation:
    """Whether the layers of a module tree keep their activations; set by the one thread that computes."""

    is_on: bool = False


def recompute_layers(body: nn.Module, recomputation: Recomputation) -> None:
    """Have the decoder layers of `body` compute their activations again in the backward pass while that is on."""
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
    """Counts what autograd keeps while `hooks` is entered: bytes of distinct storages, weights among them."""

    storages: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def token_bytes(run: Callable[[Tensor], Tensor], layers: int, device: torch.device) -> float:
    """What one more token costs a training pass in memory, in bytes: a row more, of a pass of two rows.

    Args:
        run: token ids [rows, tokens] to hidden states, with a graph.
        layers: how many decoder layers there are. The backward pass has gradients of one layer's activations at a time,
            which are taken to be as large as what the layer keeps.
    """
    tokens = _GPU_PROBE_TOKENS if device.type == "cuda" else _CPU_PROBE_TOKENS
    one, two = (_probe(run, torch.zeros(rows, tokens, dtype=torch.int64, device=device)) for rows in (1, 2))
    kept = (two.kept - one.kept) / tokens
    return max(kept + kept / layers, (two.peak - one.peak) / tokens)


@dataclass(frozen=True)
class _Probe:
    """Bytes: kept for the backward pass, and of the allocator at the worst moment (0 where it doesn't tell)."""

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
