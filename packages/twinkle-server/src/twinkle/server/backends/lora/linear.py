"""A linear layer with the low-rank terms of many adapters, and the route from rows to adapters.

`out = W x + (alpha / rank) B A x` (Hu et al. 2021, arXiv:2106.09685), with one batched matrix product for the A's and
one for the B's of a bank, and one product of W with all rows. A route, set for each micro-batch, holds the adapters'
weights.

A layer with its terms is a single autograd node, which adds the gradients in place: autograd would make a dozen nodes a
layer, and copies.
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
        a, b: by layer, float32 [n, rank, in_features] and [n, out_features, rank], of n adapters in ascending order.
        of_span: each span's adapter: a slice, or int64 [spans], possibly with duplicates.
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

    The rows are split into spans of equal size, each of one adapter. If all adapters have equally many rows there is
    one span per adapter, and nothing needs to be gathered.

    Attributes:
        rows: number of rows.
        spans: number of spans; divides `rows`.
        adapter_of_span: int64 [spans], index into the adapters; None: span i is adapter i.
        a: by layer, float32 [adapters, rank, in_features]; of routed experts' parameters [adapters, experts, rank, in].
        b: by layer, float32 [adapters, out_features, rank], times alpha / rank; of experts likewise.
        gradients: for linear layers; None if not needed. Experts' gradients are left to autograd.
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
        """The terms of a routed experts module, if it has any.

        Args:
            experts: the module's full name.
            first_row: the segment's first row in the micro-batch; None: it is the whole micro-batch.
            tokens: per row.
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
    """Split rows into the fewest equal spans of one adapter each.

    Args:
        adapters: each row's adapter index, ascending from 0.

    Returns:
        The number of spans, and each one's adapter; None: span i is adapter i.
    """
    counts = [adapters.count(adapter) for adapter in range(adapters[-1] + 1)]
    rows_a_span = gcd(*counts)
    span_adapters = adapters[::rows_a_span]
    spans = len(span_adapters)
    return spans, None if spans == len(counts) else span_adapters


class TrainingRoute:
    """Which rows of the current micro-batch get which adapters' terms; without segments, the base model alone.

    Shared by all layers of a module tree; set only by the thread that computes.

    Attributes:
        segments: cover all rows, in order.
        anchor: requires a gradient but never gets one, so that autograd visits layers whose input requires none.
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
    """Holds the base layer, and exposes its weight and bias to models that read them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def wrap_modules(model: nn.Module, names: Iterable[str], wrap: Callable[[Any, str], nn.Module]) -> None:
    """Replace each named module by `wrap(module, name)`."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, wrap(getattr(parent, child), name))


class LoraLinear(WrappedLinear):
    """A frozen linear layer, plus the low-rank terms that the route names."""

    def __init__(self, base: nn.Linear, name: str, route: TrainingRoute) -> None:
        super().__init__(base)
        self._name = name
        self._route = route

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: the micro-batch's tokens, row-major: [rows, tokens, in_features], or flattened.
        """
        segments = self._route.segments
        if not any(self._name in segment.a for segment in segments):
            return functional.linear(x, self.weight, self.bias)
        product = _Product.apply(x, self.weight, self.bias, self._route.anchor, self._name, segments)
        # Not inside the Function, of whose views none may be changed in place, as Falcon does with this output.
        return cast("Tensor", product).view(*x.shape[:-1], self.weight.shape[0])


class _Product(torch.autograd.Function):
    """A linear layer and its terms as one autograd node; see `LoraLinear.forward`.

    Tensors as narrow as the rank are kept transposed, [spans, rank, tokens] and [spans, rank, features]: on a CPU,
    products whose last dimension is that narrow take up to nine times as long.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """
        Args:
            args: x, weight, bias, the route's anchor, the layer's name, the segments.

        Returns:
            [tokens, out_features].
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
    """[tokens, features] of a micro-batch, row-major, to [spans, tokens per span, features] of each segment."""
    if len(segments) == 1:
        return [flat.view(segments[0].spans, -1, flat.shape[-1])]
    tokens_a_row = flat.shape[0] // sum(segment.rows for segment in segments)
    parts = flat.split([segment.rows * tokens_a_row for segment in segments])
    return [part.view(s.spans, -1, flat.shape[-1]) for part, s in zip(parts, segments, strict=True)]
