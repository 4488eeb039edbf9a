"""Log-probabilities of target tokens from hidden states, without ever holding the logits of all tokens.

The output head runs over a few positions of all rows at a time; in a training pass each chunk is computed again when
its gradient is due, so that only one chunk's logits are alive at any moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits in a chunk: 64 MiB in float32, of which a few copies are alive at a time.
MAX_CHUNK_LOGITS = 2**24


def chunked_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    max_chunk_logits: int = MAX_CHUNK_LOGITS,
) -> Tensor:
    """Log-softmax in float32 of the head's logits, at the targets.

    Args:
        head: hidden states [rows, n, hidden] to logits [rows, n, vocabulary], any float type.
        hidden: [rows, tokens, hidden].
        targets: int64 [rows, tokens, k]: k target tokens at each position.
        vocab_size: how many logits the head gives.

    Returns:
        float32 [rows, tokens, k].
    """
    positions = max(1, max_chunk_logits // (hidden.shape[0] * vocab_size))
    chunks = list(zip(hidden.split(positions, 1), targets.split(positions, 1), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        results = [_logprobs(head, *chunk) for chunk in chunks]
    else:
        results = [
            cast("Tensor", checkpoint(_logprobs, head, *chunk, use_reentrant=False, preserve_rng_state=False))
            for chunk in chunks
        ]
    return torch.cat(results, dim=1)


def _logprobs(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, targets) - torch.logsumexp(logits, dim=-1, keepdim=True)
