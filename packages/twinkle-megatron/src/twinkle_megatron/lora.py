"""Low-rank terms on Megatron-Core's parallel linear layers, for the many adapters that share a micro-batch.

`out = W x + (alpha / rank) B A x` (Hu et al. 2021, arXiv:2106.09685), with W spread over the ranks of a tensor group:

    column-parallel    A whole, B's rows shared out       A's output is the same on all ranks
    row-parallel       A's columns shared out, B whole    A's output is a part of a sum

so only [tokens, rows, rank] travels between ranks, never [tokens, rows, features]. Under sequence parallelism a rank
has its own tokens between the layers; then the gradients of the whole matrices are parts of a sum too: see
`shards.Shard.is_partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from twinkle_megatron import collectives
from twinkle_megatron.groups import Group
from twinkle_megatron.joins import Join


@dataclass(frozen=True, eq=False)
class ShardSegment:
    """Consecutive rows of a micro-batch whose adapters are in one bank.

    Attributes:
        rows: number of this rank's rows; 0 if only other ranks have rows of these adapters.
        adapters: number of adapters.
        adapter_of_row: int64 [rows], index into the adapters.
        a: by layer, float32 [adapters, rank, in_features], the part kept here.
        b: by layer, float32 [adapters, out_features, rank], times alpha / rank.
    """

    rows: int
    adapters: int
    adapter_of_row: Tensor
    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def low(self, name: str, x: Tensor) -> Tensor:
        """A x: [tokens, self.rows, in_features] to [tokens, self.rows, rank]."""
        return self._product(x, self.a[name])

    def high(self, name: str, low: Tensor) -> Tensor:
        """B applied to the output of `low`: [tokens, self.rows, rank] to [tokens, self.rows, out_features]."""
        return self._product(low, self.b[name])

    def _product(self, x: Tensor, matrices: Tensor) -> Tensor:
        if len(matrices) == 1:
            return nn.functional.linear(x, matrices[0].to(x.dtype))
        # Selected before it is cast, so that an adapter's gradient is added up over its rows in float32.
        own = matrices.index_select(0, self.adapter_of_row).to(x.dtype).transpose(1, 2)
        return torch.bmm(x.transpose(0, 1), own).transpose(0, 1)


@dataclass(eq=False)
class ForwardContext:
    """What the layers need for the current micro-batch; set by the one thread that computes.

    Attributes:
        segments: this rank's rows, in order. None: the base model alone.
        targets: int64 [tokens, rows, k], whose log-probabilities the last stage returns.
        recomputes: whether layers recompute their activations in the backward pass.
    """

    segments: list[ShardSegment] = field(default_factory=list["ShardSegment"])
    targets: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    recomputes: bool = False


@dataclass(frozen=True, eq=False)
class Parallelism:
    """How a stage's layers are spread: over which ranks, and whether these share out the tokens between the layers."""

    tensor: Group
    by_sequence: bool

    def after_column_a(self, low: Tensor) -> Tensor:
        """[tokens here, rows, rank] to [all tokens, rows, rank], the same on all ranks."""
        if self.by_sequence:
            return collectives.gather_tokens(low, self.tensor)
        return collectives.sum_in_backward(low, self.tensor)

    def after_row_a(self, low: Tensor) -> Tensor:
        """Each rank's part of [all tokens, rows, rank] to the sum of [tokens here, rows, rank]."""
        if self.by_sequence:
            return collectives.sum_and_scatter_tokens(low, self.tensor)
        return collectives.sum_in_forward(low, self.tensor)


def add_terms(
    out: Tensor,
    segments: Sequence[ShardSegment],
    names: Sequence[str],
    term_of: Callable[[ShardSegment, int], Tensor],
) -> Tensor:
    """`out` with a term on the rows of each segment that has any of the layers `names`.

    Args:
        out: [tokens, rows, features].
        term_of: a segment and its first row to [tokens, segment.rows, features].
    """
    parts: list[Tensor] = []
    start = 0
    changed = False
    for segment in segments:
        own = out[:, start : start + segment.rows]
        if segment.rows and names[0] in segment.a:
            own = own + term_of(segment, start)
            changed = True
        parts.append(own)
        start += segment.rows
    if not changed:
        return out
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class ParallelLayer(nn.Module):
    """Replaces one of Megatron-Core's linear layers, and exposes its weight."""

    def __init__(self, base: nn.Module, context: ForwardContext, parallelism: Parallelism) -> None:
        super().__init__()
        self.base = base
        self._context = context
        self._parallelism = parallelism

    @property
    def weight(self) -> Tensor:
        return cast("Tensor", self.base.weight)


class ColumnLora(ParallelLayer):
    """A column-parallel layer that holds several of the model's (q, k, v), each with its own terms."""

    def __init__(
        self,
        base: nn.Module,
        names: Sequence[str],
        join: Join,
        context: ForwardContext,
        parallelism: Parallelism,
    ) -> None:
        """
        Args:
            names: the layers that it holds, by their names in Transformers.
            join: puts their outputs in the order of the base layer's.
        """
        super().__init__(base, context, parallelism)
        self._names = tuple(names)
        self._join = join

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        out, bias = self.base(x, *args, **kwargs)

        def term(segment: ShardSegment, start: int) -> Tensor:
            own = x[:, start : start + segment.rows]
            lows = [segment.low(name, own) for name in self._names]
            # One message for all.
            whole = self._parallelism.after_column_a(torch.cat(lows, dim=-1))
            parts = cast("list[Tensor]", whole.split([low.shape[-1] for low in lows], dim=-1))
            return self._join(
                [segment.high(name, part) for name, part in zip(self._names, parts, strict=True)]
            )

        return add_terms(out, self._context.segments, self._names, term), bias


class RowLora(ParallelLayer):
    """A row-parallel layer."""

    def __init__(self, base: nn.Module, name: str, context: ForwardContext, parallelism: Parallelism) -> None:
        super().__init__(base, context, parallelism)
        self._name = name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        out, bias = self.base(x, *args, **kwargs)

        def term(segment: ShardSegment, start: int) -> Tensor:
            low = segment.low(self._name, x[:, start : start + segment.rows])
            return segment.high(self._name, self._parallelism.after_row_a(low))

        return add_terms(out, self._context.segments, (self._name,), term), bias
