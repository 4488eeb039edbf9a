"""The output head, its vocabulary spread over the tensor group: hidden states to log-probabilities of the targets.

Replaces `GPTModel`'s output layer, so that no rank ever holds the logits of all tokens, nor of the whole vocabulary.
The head runs over a few positions at a time; in a training pass each chunk is recomputed for its gradient.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import checkpoint as checkpointing

from twinkle.server.backends.lora.losses.logprobs import max_chunk_logits
from twinkle_megatron import collectives
from twinkle_megatron.groups import Group
from twinkle_megatron.lora import ForwardContext, Parallelism, ParallelLayer, ShardSegment, add_terms

NAME = "lm_head"


class LogprobHead(ParallelLayer):
    """Gives log-softmax in float32 at `context.targets`, where the layer it replaces gives logits."""

    def __init__(
        self, base: nn.Module, vocab_size: int, context: ForwardContext, parallelism: Parallelism
    ) -> None:
        """
        Args:
            base: column-parallel; its weight is [share of the padded vocabulary, hidden].
            vocab_size: number of tokens; the rest is padding.
        """
        super().__init__(base, context, parallelism)
        self._vocab_size = vocab_size

    def forward(self, hidden: Tensor, *_unused: Any, **_also_unused: Any) -> tuple[Tensor, None]:
        """
        Args:
            hidden: [tokens here, rows, hidden].

        Returns:
            float32 [tokens, rows, k].
        """
        tensor, by_sequence = self._parallelism.tensor, self._parallelism.by_sequence
        segments = self._context.segments or [_base_alone(hidden)]
        lows = self._lows(hidden, segments)
        share = collectives.gather_tokens if by_sequence else collectives.sum_in_backward
        whole = share(hidden, tensor)
        targets = self._context.targets
        share_of_vocab = self.weight.shape[0]
        most_tokens = max_chunk_logits(whole.device, share_of_vocab) // share_of_vocab
        positions = max(1, most_tokens // max(1, whole.shape[1]))
        results: list[Tensor] = []
        for start in range(0, len(targets), positions):
            end = start + positions
            chunk = (segments, whole[start:end], [low[start:end] for low in lows], targets[start:end])
            if len(targets) <= positions or not torch.is_grad_enabled():
                results.append(self._logprobs(*chunk))
            else:
                run = cast("Any", checkpointing.checkpoint)
                results.append(run(self._logprobs, *chunk, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(results), None

    def _lows(self, hidden: Tensor, segments: list[ShardSegment]) -> list[Tensor]:
        """The output of each segment's A: [tokens, rows of the segment, rank]; empty if it has no A."""
        lows: list[Tensor] = []
        start = 0
        for segment in segments:
            own = hidden[:, start : start + segment.rows]
            if segment.rows and NAME in segment.a:
                lows.append(self._parallelism.after_column_a(segment.low(NAME, own)))
            else:
                lows.append(hidden.new_zeros(0))
            start += segment.rows
        return lows

    def _logprobs(
        self, segments: list[ShardSegment], hidden: Tensor, lows: list[Tensor], targets: Tensor
    ) -> Tensor:
        """[n, rows, hidden] and [n, rows, k] to [n, rows, k]."""
        low_of = {id(segment): low for segment, low in zip(segments, lows, strict=True)}

        def term(segment: ShardSegment, _start: int) -> Tensor:
            return segment.high(NAME, low_of[id(segment)])

        logits = add_terms(nn.functional.linear(hidden, self.weight), segments, (NAME,), term).float()
        tensor = self._parallelism.tensor
        first = tensor.index * self.weight.shape[0]
        if first + logits.shape[-1] > self._vocab_size:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self._vocab_size - first
            logits = logits.masked_fill(padding, float("-inf"))
        return cast("Tensor", cast("Any", _ShardedLogprobs).apply(logits, targets, first, tensor))


def _base_alone(hidden: Tensor) -> ShardSegment:
    return ShardSegment(hidden.shape[1], 0, torch.zeros(0, dtype=torch.int64), {}, {})


class _ShardedLogprobs(Function):
    """logits[target] - log(sum(exp(logits))), each rank holding the logits of a part of the vocabulary.

    The gradient is onehot(target) - softmax(logits), of which each rank keeps its part.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: Group) -> Tensor:
        """
        Args:
            logits: float32 [..., share], of the tokens from `first` on.
            targets: int64 [..., k].
        """
        highest = logits.amax(-1, keepdim=True)
        if group.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group.ranks)
        shifted = logits - highest
        own = targets - first
        is_here = (own >= 0) & (own < logits.shape[-1])
        own = own.clamp(0, logits.shape[-1] - 1)
        picked = shifted.gather(-1, own).masked_fill(~is_here, 0.0)
        exps = shifted.exp_()
        sums = torch.cat([exps.sum(-1, keepdim=True), picked], dim=-1)
        if group.size > 1:
            dist.all_reduce(sums, group=group.ranks)
        total, picked = sums[..., :1], sums[..., 1:]
        ctx.save_for_backward(exps.div_(total), own, is_here)
        return picked - total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        softmax, own, is_here = ctx.saved_tensors
        out = softmax * -grad.sum(-1, keepdim=True)
        out.scatter_add_(-1, own, grad.masked_fill(~is_here, 0.0))
        return out, None, None, None
