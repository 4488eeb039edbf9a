"""Log-probabilities of target tokens from hidden states, without ever holding the logits of many tokens.

The output head runs over a few positions of all rows at a time. A training pass keeps a bounded number of logits for
its backward pass; if there would be more, each chunk is computed again for its gradient, so that only one chunk's
logits are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits in memory at a time: 64 MiB in float32.
MAX_CHUNK_LOGITS = 2**24
# On a CPU a chunk should be little larger than the cache, but a product needs some tokens to be efficient.
_CPU_CHUNK_LOGITS = 2**20
_CPU_CHUNK_TOKENS = 128


def chunked_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    max_chunk_logits: int = MAX_CHUNK_LOGITS,
) -> Tensor:
    """Log-softmax in float32 of the head's logits, at the targets.

    Args:
        head: hidden states [rows, n, hidden] to logits [rows, n, vocabulary], any float type; its last operation must
            not need its own output for its gradient, which is written over it.
        hidden: [rows, tokens, hidden].
        targets: int64 [rows, tokens, k]: k target tokens at each position.
        vocab_size: how many logits the head gives.
        max_chunk_logits: most logits that are alive at a time, unless one position of all rows has more.

    Returns:
        float32 [rows, tokens, k].
    """
    rows, tokens = hidden.shape[:2]
    chunk_logits = max_chunk_logits
    if hidden.device.type == "cpu":
        chunk_logits = min(max_chunk_logits, max(_CPU_CHUNK_LOGITS, _CPU_CHUNK_TOKENS * vocab_size))
    positions = max(1, chunk_logits // (rows * vocab_size))
    chunks = list(zip(hidden.split(positions, 1), targets.split(positions, 1), strict=True))
    if rows * tokens * vocab_size <= max_chunk_logits or len(chunks) == 1 or not torch.is_grad_enabled():
        results = [_logprobs(head, *chunk) for chunk in chunks]
    else:
        results = [
            cast("Tensor", checkpoint(_logprobs, head, *chunk, use_reentrant=False, preserve_rng_state=False))
            for chunk in chunks
        ]
    return torch.cat(results, dim=1)


def _logprobs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return cast("Tensor", _LogSoftmaxAt.apply(head(hidden).float(), targets))


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
