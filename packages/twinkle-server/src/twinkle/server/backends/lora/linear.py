"""A linear layer with the low-rank terms of many adapters, and the route that says which rows get whose term.

For the rows of an adapter, `out = W x + (alpha / rank) B A x` (Hu et al. 2021, arXiv:2106.09685). All adapters of a
bank are computed in one batched matrix product each for A and B; the base's product is one for all rows. Owns no
weights: a route carries them, and is set for the time of one micro-batch.

A layer with its terms is one node of the graph, and writes the matrices' gradients itself, where the route says:
autograd would make a dozen nodes a layer, and copies of what is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import gcd
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle.server.backends.lora.experts import DOWN, GATE_UP, ExpertTerm


@dataclass(frozen=True, eq=False)
class Gradients:
    """Where the gradients of a segment's matrices are added.

    Attributes:
        a, b: by layer, float32 [n, rank, in_features] and [n, out_features, rank]; n adapters, in rising order.
        of_span: which of them each span is: a slice, or int64 [spans], where an adapter may come several times.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    of_span: slice | Tensor

    def add(self, target: Tensor, gradient: Tensor) -> None:
        """`gradient` is [spans, ...], any float type; `target` one of the tensors of `a` and `b`."""
        if isinstance(self.of_span, slice):
            target[self.of_span].add_(gradient)
        else:
            target.index_add_(0, self.of_span, gradient.to(target.dtype))


@dataclass(frozen=True, eq=False)
class BankSegment:
    """Consecutive rows of a micro-batch whose adapters are in one bank.

    The rows fall into spans of equally many rows, each of one adapter: with n rows for each adapter there is one span
    an adapter, and nothing needs to be gathered.

    Attributes:
        rows: how many rows.
        spans: how many spans; divides `rows`.
        adapter_of_span: int64 [spans], index into the adapters; None where span i is adapter i.
        a: by layer, float32 [adapters, rank, in_features]; of routed experts' parameters [adapters, experts, rank, in].
        b: by layer, float32 [adapters, out_features, rank], times alpha / rank; of experts likewise.
        gradients: of linear layers' matrices; None where they are not needed. Those of experts are autograd's.
    """

    rows: int
    spans: int
    adapter_of_span: Tensor | None
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    gradients: Gradients | None = None

    def matrices(self, layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of a linear layer, [spans, rank, in_features] and, transposed, [spans, rank, out_features]."""
        a, b = self.a[layer], self.b[layer].transpose(1, 2)
        if self.adapter_of_span is not None:
            a, b = a.index_select(0, self.adapter_of_span), b.index_select(0, self.adapter_of_span)
        return a.to(dtype), b.to(dtype).contiguous()

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


class TrainingRoute:
    """Which rows of the micro-batch under way get which adapters' terms; no segments is the base model alone.

    Shared by all layers of a module tree, set by the one thread that computes.

    Attributes:
        segments: together all rows, in order.
        anchor: an input that requires a gradient, and never gets one: it has autograd go back to layers whose own input
            requires none.
    """

    def __init__(self) -> None:
        self.segments: list[BankSegment] = []
        self.anchor = torch.zeros((), requires_grad=True)

    def expert_terms(self, experts: str, rows: int) -> list[ExpertTerm]:
        """See `twinkle.server.backends.lora.experts.ExpertRoute`."""
        all_rows = sum(segment.rows for segment in self.segments)
        terms: list[ExpertTerm] = []
        first = 0
        for segment in self.segments:
            own_first = first if len(self.segments) > 1 else None
            if term := segment.expert_term(experts, own_first, rows // all_rows):
                terms.append(term)
            first += segment.rows
        return terms


class WrappedLinear(nn.Module):
    """Holds the base layer, and shows its weight and bias to models that look at them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def wrap_linears(model: nn.Module, names: Iterable[str], wrap: Callable[[nn.Linear, str], nn.Module]) -> None:
    """Put `wrap(layer, name)` in place of each linear layer named."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, child)
        assert isinstance(base, nn.Linear)
        setattr(parent, child, wrap(base, name))


class LoraLinear(WrappedLinear):
    """A frozen linear layer and, where the route says so, low-rank terms."""

    def __init__(self, base: nn.Linear, name: str, route: TrainingRoute) -> None:
        super().__init__(base)
        self._name = name
        self._route = route

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: [..., in_features], row-major in the micro-batch's rows: [rows, tokens, in_features], or flattened.
        """
        segments = self._route.segments
        if not any(self._name in segment.a for segment in segments):
            return functional.linear(x, self.weight, self.bias)
        product = _Product.apply(x, self.weight, self.bias, self._route.anchor, self._name, segments)
        # Here and not in there: what a model adds to this in place, as Falcon does, must be no view made by a Function.
        return cast("Tensor", product).view(*x.shape[:-1], self.weight.shape[0])


class _Product(torch.autograd.Function):
    """A linear layer and its terms as one node of the graph. See `LoraLinear.forward`.

    What is as narrow as the rank is kept transposed, [spans, rank, tokens] and [spans, rank, features]: on a CPU
    products whose last dimension is that narrow take up to nine times as long.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """
        Args:
            args: x, the layer's weight and bias, the route's anchor, the layer's name, the segments.

        Returns:
            [all but the last dimension of x as one, out_features].
        """
        x, weight, bias, _, layer, segments = args
        flat = x.reshape(-1, x.shape[-1])
        out = functional.linear(flat, weight, bias)
        saved: list[Tensor] = [flat, weight]
        for segment, own_x, own_out in zip(
            segments, _by_span(flat, segments), _by_span(out, segments), strict=True
        ):
            if layer in segment.a:
                a, b = segment.matrices(layer, x.dtype)
                low = torch.bmm(a, own_x.transpose(1, 2))
                own_out.baddbmm_(low.transpose(1, 2), b)
                saved += (a, b, low)
        ctx.save_for_backward(*saved)
        ctx.layer, ctx.segments, ctx.shape = layer, segments, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, *saved = ctx.saved_tensors
        layer, segments = ctx.layer, ctx.segments
        grad = grad_outputs[0].reshape(-1, weight.shape[0])
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grads_x = [None] * len(segments) if grad_x is None else _by_span(grad_x, segments)
        matrices = iter(saved)
        for segment, own_x, own_grad, own_grad_x in zip(
            segments, _by_span(flat, segments), _by_span(grad, segments), grads_x, strict=True
        ):
            if layer in segment.a:
                a, b, low = next(matrices), next(matrices), next(matrices)
                grad_low = torch.bmm(b, own_grad.transpose(1, 2))
                if own_grad_x is not None:
                    own_grad_x.baddbmm_(grad_low.transpose(1, 2), a)
                if (wanted := segment.gradients) is not None:
                    wanted.add(wanted.a[layer], torch.bmm(grad_low, own_x))
                    wanted.add(wanted.b[layer], torch.bmm(low, own_grad).transpose(1, 2))
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, None


def _by_span(flat: Tensor, segments: list[BankSegment]) -> list[Tensor]:
    """A micro-batch's tokens [tokens, features], row-major, as [spans, tokens a span, features] of each segment."""
    if len(segments) == 1:
        return [flat.view(segments[0].spans, -1, flat.shape[-1])]
    tokens_a_row = flat.shape[0] // sum(segment.rows for segment in segments)
    parts = flat.split([segment.rows * tokens_a_row for segment in segments])
    return [part.view(s.spans, -1, flat.shape[-1]) for part, s in zip(parts, segments, strict=True)]
