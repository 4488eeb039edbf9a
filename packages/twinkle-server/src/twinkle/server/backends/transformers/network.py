"""A model with adapters, as a pass calls it: tokens to hidden states, and to log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from twinkle.server.backends.lora.linear import TrainingRoute
from twinkle.server.backends.lora.losses.logprobs import Head, chunked_logprobs
from twinkle.server.backends.transformers.activations import Recomputation
from twinkle.server.backends.transformers.sharding import ShardedModel


@dataclass(frozen=True, eq=False)
class LoraNetwork:
    """A module tree with `LoraLinear` layers, split in two.

    Attributes:
        body: token ids [rows, tokens] to hidden states.
        head: hidden states to logits, a chunk of tokens at a time.
        route: what its layers look at.
        recomputation: whether they keep their activations.
        dtype: of the weights.
        boundaries: lengths that separate rows which must not share a call: see `rope`.
        sharded: the model, if it is spread over ranks.
    """

    body: nn.Module
    head: Head
    vocab_size: int
    route: TrainingRoute
    recomputation: Recomputation
    device: torch.device
    dtype: torch.dtype
    boundaries: tuple[int, ...] = ()
    sharded: ShardedModel | None = None

    def hidden(self, tokens: Tensor) -> Tensor:
        """[rows, n, hidden] of `tokens`, int64 [rows, n]."""
        return self._run(lambda: self._hidden(tokens))

    def logprobs(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """float32 [rows, n, k] of the `targets`, int64 [rows, n, k]; `tokens` is int64 [rows, n], padded at the right.

        Attention is causal, so padding at the right of a row can't affect the row's own tokens: no mask is needed, and
        attention uses its fastest kernel.
        """
        return self._run(lambda: chunked_logprobs(self.head, self._hidden(tokens), targets, self.vocab_size))

    def _run(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if self.sharded is None else self.sharded.run(compute)

    def _hidden(self, tokens: Tensor) -> Tensor:
        return cast("Tensor", cast("Any", self.body)(input_ids=tokens, use_cache=False).last_hidden_state)
