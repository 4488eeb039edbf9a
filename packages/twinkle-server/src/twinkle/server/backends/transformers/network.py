"""A model with adapters, as a pass calls it: tokens to hidden states, and to log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from twinkle.server.backends.lora.linear import TrainingRoute
from twinkle.server.backends.lora.losses.logprobs import Head, chunked_logprobs
from twinkle.server.backends.protocol import Row
from twinkle.server.backends.shares import micro_batch_tokens
from twinkle.server.backends.transformers.activations import Recomputation
from twinkle.server.backends.transformers.packed_rows import PackedRows
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
        packs: whether it takes rows of different lengths behind each other.
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
    packs: bool = False

    def tokens(self, rows: Sequence[Row]) -> int:
        """What a micro-batch of these rows takes."""
        return micro_batch_tokens(rows, self.packs)

    def hidden(self, tokens: Tensor, packed_rows: PackedRows | None = None) -> Tensor:
        """[rows, n, hidden] of `tokens`, int64 [rows, n]; of packed rows [1, n]."""
        return self._run(lambda: self._hidden(tokens, packed_rows))

    def logprobs(self, tokens: Tensor, targets: Tensor, packed_rows: PackedRows | None = None) -> Tensor:
        """float32 [rows, n, k] of the `targets`, int64 [rows, n, k]; `tokens` is int64 [rows, n], padded at the right.
        Of packed rows [1, n, k] and [1, n].

        Attention is causal, so padding at the right of a row can't affect the row's own tokens: no mask is needed, and
        attention uses its fastest kernel.
        """
        return self._run(
            lambda: chunked_logprobs(self.head, self._hidden(tokens, packed_rows), targets, self.vocab_size)
        )

    def _run(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute() if self.sharded is None else self.sharded.run(compute)

    def _hidden(self, tokens: Tensor, packed_rows: PackedRows | None) -> Tensor:
        body = cast("Any", self.body)
        if packed_rows is None:
            return cast("Tensor", body(input_ids=tokens, use_cache=False).last_hidden_state)
        found = body(
            input_ids=tokens,
            use_cache=False,
            position_ids=packed_rows.positions,
            packed_rows=packed_rows,
        )
        return cast("Tensor", found.last_hidden_state)
