"""Log-probabilities of target tokens from hidden states, without ever holding the logits of many tokens.

The output head runs over a chunk of tokens at a time, whatever rows they are of: a product of two matrices. A training
pass keeps a bounded number of logits for its backward pass; if there would be more, each chunk is computed again for
its gradient, so that only one chunk's logits are in memory at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head: TypeAlias = Callable[[Tensor, int], Tensor]
"""Hidden states [n, hidden] of tokens that follow each other, and the number of the first of them, to logits
[n, vocabulary], any float type. The last operation must not need its own output for its gradient, which is written over
it."""

# Logits in memory at a time: 64 MiB in float32. On a GPU more, if that is fewer tokens than make the head's product
# efficient: each chunk reads all of the head's weights.
MAX_CHUNK_LOGITS = 2**24
_GPU_CHUNK_TOKENS = 2048
# On a CPU a chunk should be little larger than the cache, but a product needs some tokens to be efficient.
_CPU_CHUNK_LOGITS = 2**20
_CPU_CHUNK_TOKENS = 128


def max_chunk_logits(device: torch.device, vocab_size: int) -> int:
    """Most logits that are alive at a time."""
    if device.type != "cuda":
        return MAX_CHUNK_LOGITS
    return max(MAX_CHUNK_LOGITS, _GPU_CHUNK_TOKENS * vocab_size)


def chunked_logprobs(
    head: Head, hidden: Tensor, targets: Tensor, vocab_size: int, most_logits: int | None = None
) -> Tensor:
    """Log-softmax in float32 of the head's logits, at the targets.

    Args:
        hidden: [..., hidden].
        targets: int64 [..., k]: k target tokens at each position.
        vocab_size: how many logits the head gives.
        most_logits: most that are alive at a time, unless one token has more; default: `max_chunk_logits`.

    Returns:
        float32 [..., k].
    """
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1, targets.shape[-1])
    most = max_chunk_logits(hidden.device, vocab_size) if most_logits is None else most_logits
    chunk_logits = most
    if hidden.device.type == "cpu":
        chunk_logits = min(most, max(_CPU_CHUNK_LOGITS, _CPU_CHUNK_TOKENS * vocab_size))
    size = max(1, chunk_logits // vocab_size)
    tokens = len(flat)
    chunks = [(flat[i : i + size], flat_targets[i : i + size], i) for i in range(0, tokens, size)]
    if tokens * vocab_size <= most or len(chunks) == 1 or not torch.is_grad_enabled():
        results = [_logprobs(head, *chunk) for chunk in chunks]
    else:
        results = [
            cast("Tensor", checkpoint(_logprobs, head, *chunk, use_reentrant=False, preserve_rng_state=False))
            for chunk in chunks
        ]
    return (results[0] if len(results) == 1 else torch.cat(results)).view(targets.shape)


def _logprobs(head: Head, hidden: Tensor, targets: Tensor, first: int) -> Tensor:
    logits = head(hidden, first)
    if logits.is_cuda and has_fused_kernels():
        from twinkle.server.backends.lora.losses.fused_logprobs import FusedLogSoftmaxAt

        return cast("Tensor", FusedLogSoftmaxAt.apply(logits, targets))
    return cast("Tensor", _LogSoftmaxAt.apply(logits.float(), targets))


@cache
def has_fused_kernels() -> bool:
    """Whether kernels of our own can compute log-probabilities: torch is built for GPUs, and Triton is there."""
    is_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    return is_for_gpus and importlib.util.find_spec("triton") is not None


class _LogSoftmaxAt(torch.autograd.Function):
    """Log-softmax of logits [..., vocabulary] at targets [..., k]. The gradient overwrites the logits.

    d logprob[t] / d logit[v] = (t == v) - softmax(logits)[v]
    """

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        logits, targets = args
        normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(-1, targets) - normaliser

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, targets, normaliser = ctx.saved_tensors
        [grad] = grad_outputs
        grad_logits = logits.sub_(normaliser).exp_().mul_(-grad.sum(dim=-1, keepdim=True))
        return grad_logits.scatter_add_(-1, targets, grad), None
