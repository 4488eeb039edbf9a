"""A linear layer with the low-rank terms of many adapters, and the route that says which rows get whose term.

For the rows of an adapter, `out = W x + (alpha / rank) B A x` (Hu et al. 2021, arXiv:2106.09685). All adapters of a
bank are computed in one batched matrix product each for A and B; the base's product is one for all rows. Owns no
weights: a route carries them, and is set for the time of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn

from twinkle.server.backends.transformers.expert_lora import DOWN, GATE_UP, ExpertTerm
from twinkle.server.backends.transformers.wrapped_linear import WrappedLinear


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive rows of a micro-batch whose adapters are in one bank.

    The rows fall into spans of equally many rows, each of one adapter: with n rows for each adapter there is one span
    an adapter, and nothing needs to be gathered.

    Attributes:
        rows: how many rows.
        spans: how many spans; divides `rows`.
        adapter_of_span: int64 [spans], index into the adapters; None where span i is adapter i.
        a: by layer, float32 [adapters, rank, in_features]; of routed experts' parameters [adapters, experts, rank, in].
        b: by layer, float32 [adapters, out_features, rank], times alpha / rank; of experts likewise.
    """

    rows: int
    spans: int
    adapter_of_span: Tensor | None
    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def add_term(self, layer: str, x: Tensor, out: Tensor) -> Tensor:
        """`out` plus the low-rank term.

        Args:
            x: [self.rows, n, in_features].
            out: [self.rows, n, out_features], same type.
        """
        if layer not in self.a:
            return out
        a, b = self.a[layer].to(x.dtype), self.b[layer].to(x.dtype)
        if self.adapter_of_span is not None:
            a, b = a.index_select(0, self.adapter_of_span), b.index_select(0, self.adapter_of_span)
        low = torch.bmm(x.reshape(self.spans, -1, x.shape[-1]), a.transpose(1, 2))
        summed = torch.baddbmm(out.reshape(self.spans, -1, out.shape[-1]), low, b.transpose(1, 2))
        return summed.view_as(out)

    def expert_term(self, experts: str, first_row: int | None, tokens: int) -> ExpertTerm | None:
        """The terms of a routed experts' module, if it has any.

        Args:
            experts: the module's full name.
            first_row: where the segment begins in the micro-batch; None if it is all of it.
            tokens: how many a row.
        """
        gate_up, down = f"{experts}.{GATE_UP}", f"{experts}.{DOWN}"
        if gate_up not in self.a:
            return None
        device = self.a[gate_up].device
        of_span = self.adapter_of_span
        adapter = torch.arange(self.spans, device=device) if of_span is None else of_span
        adapter = adapter.repeat_interleave(self.rows // self.spans * tokens)
        rows = None
        if first_row is not None:
            rows = torch.arange(first_row * tokens, (first_row + self.rows) * tokens, device=device)
        return ExpertTerm(rows, adapter, self.a[gate_up], self.b[gate_up], self.a[down], self.b[down])


def spans_of(adapters: list[int]) -> tuple[int, list[int] | None]:
    """Cut rows into equal spans of one adapter each, as few as possible.

    Args:
        adapters: for each row the index of its adapter; rows of an adapter stand together, indices count up from 0.

    Returns:
        How many spans, and each one's adapter, or None where span i is adapter i.
    """
    counts = [adapters.count(adapter) for adapter in range(adapters[-1] + 1)]
    rows_a_span = gcd(*counts)
    span_adapters = adapters[::rows_a_span]
    spans = len(span_adapters)
    return spans, None if spans == len(counts) else span_adapters


class Route:
    """Which rows of the micro-batch under way get which adapters' terms; no segments is the base model alone.

    Shared by all layers of a module tree, set by the one thread that computes.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def expert_terms(self, experts: str, rows: int) -> list[ExpertTerm]:
        """See `twinkle.server.backends.transformers.expert_lora.ExpertRoute`."""
        all_rows = sum(segment.rows for segment in self.segments)
        terms: list[ExpertTerm] = []
        first = 0
        for segment in self.segments:
            own_first = first if len(self.segments) > 1 else None
            if term := segment.expert_term(experts, own_first, rows // all_rows):
                terms.append(term)
            first += segment.rows
        return terms


class LoraLinear(WrappedLinear):
    """A frozen linear layer and, where the route says so, low-rank terms."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__(base)
        self._name = name
        self._route = route

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: [..., in_features], row-major in the micro-batch's rows: [rows, tokens, in_features], or flattened.
        """
        out: Tensor = self.base(x)
        segments = self._route.segments
        if not segments:
            return out
        if len(segments) == 1:
            rows = segments[0].rows
            term = segments[0].add_term(self._name, _by_row(x, rows), _by_row(out, rows))
            return term.view_as(out)
        sizes = [segment.rows for segment in segments]
        xs = _by_row(x, sum(sizes)).split(sizes)
        outs = _by_row(out, sum(sizes)).split(sizes)
        parts = [s.add_term(self._name, x, o) for s, x, o in zip(segments, xs, outs, strict=True)]
        return torch.cat(parts).view_as(out)


def _by_row(x: Tensor, rows: int) -> Tensor:
    return x.reshape(rows, -1, x.shape[-1])
