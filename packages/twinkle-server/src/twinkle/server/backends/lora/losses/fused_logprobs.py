"""Log-softmax at target tokens by kernels of our own, on a GPU: logits are read once, in the type the head gives them.

In torch's operations the logits of a chunk are converted to float32, and then read or written ten times; that is more
than the head's product takes. Here they are read once for the normaliser, and once more for the gradient, which is
written over them. No atomics: the same bits each time.

Written in Triton, which comes with torch's builds for GPUs; its interpreter runs them on a CPU, in tests.
"""

# No part of the development environment, whose torch is built for CPUs.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits that a program takes at a time.
_BLOCK = 4096
# Below every logit, but finite: the difference of two infinities is none.
_LOWEST = -1e30


class FusedLogSoftmaxAt(torch.autograd.Function):
    """Log-softmax of logits [n, vocabulary], of any float type, at targets int64 [n, k]: float32 [n, k]. The gradient
    overwrites the logits.

    d logprob[t] / d logit[v] = (t == v) - softmax(logits)[v]
    """

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        logits, targets = args
        logits, targets = logits.contiguous(), targets.contiguous()
        tokens, vocab_size = logits.shape
        normaliser = torch.empty(tokens, device=logits.device, dtype=torch.float32)
        _logsumexp[(tokens,)](logits, normaliser, vocab_size, BLOCK=_BLOCK, LOWEST=_LOWEST)
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(1, targets).float() - normaliser[:, None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, targets, normaliser = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        tokens, vocab_size = logits.shape
        grid = (tokens, triton.cdiv(vocab_size, _BLOCK))
        _gradient[grid](logits, normaliser, targets, grad, vocab_size, targets.shape[1], BLOCK=_BLOCK)
        return logits, None


@triton.jit
def _logsumexp(logits, normaliser, vocab_size, BLOCK: tl.constexpr, LOWEST: tl.constexpr):  # pyright: ignore
    """Of a row of logits [vocabulary], in one pass (Milakov and Gimelshein 2018, arXiv:1805.02867): each lane keeps the
    largest logit so far, and the sum of exponentials relative to it.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        at = start + lanes
        logit = tl.load(logits + row * vocab_size + at, mask=at < vocab_size, other=LOWEST).to(tl.float32)
        larger = tl.maximum(largest, logit)
        total = total * tl.exp(largest - larger) + tl.where(at < vocab_size, tl.exp(logit - larger), 0.0)
        largest = larger
    most = tl.max(largest, 0)
    tl.store(normaliser + row, most + tl.log(tl.sum(total * tl.exp(largest - most), 0)))


@triton.jit
def _gradient(logits, normaliser, targets, grad, vocab_size, k, BLOCK: tl.constexpr):  # pyright: ignore
    """Of a block of a row's logits, written over it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * vocab_size + at
    logit = tl.load(place, mask=at < vocab_size, other=0.0).to(tl.float32)
    at_targets = tl.zeros([BLOCK], tl.float32)
    in_all = tl.zeros([1], tl.float32)
    for i in range(k):
        one = tl.load(grad + row * k + i)
        at_targets += tl.where(at == tl.load(targets + row * k + i), one, 0.0)
        in_all += one
    found = at_targets - in_all * tl.exp(logit - tl.load(normaliser + row))
    tl.store(place, found.to(logits.dtype.element_ty), mask=at < vocab_size)
