"""A linear layer with the low-rank terms of many adapters, and the route from tokens to adapters.

`out = W x + (alpha / rank) B A x` (Hu et al. 2021, arXiv:2106.09685), with one product for the A's and one for
the B's of a bank (`spans`), and one product of W with all tokens. A route, set for each micro-batch, holds the
adapters' weights.

A layer with its terms is a single autograd node, which adds the gradients in place: autograd would make a dozen nodes a
layer, and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle.server.backends.lora.experts import DOWN, GATE_UP, ExpertTerm
from twinkle.server.backends.lora.spans import ALIGNMENT, Spans
from twinkle.server.backends.lora.transfer import to_device


@dataclass(frozen=True, eq=False)
class Gradients:
    """Where the gradients of a segment's matrices are added.

    Attributes:
        a, b: by layer, float32 [n, rank, in_features] and [n, out_features, rank], of n adapters in ascending order.
        of_adapters: the segment's adapters among them: a slice, or int64 [adapters], without duplicates.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    of_adapters: slice | Tensor

    def add(self, target: Tensor, gradient: Tensor) -> None:
        """`gradient` is [adapters, ...], any float type; `target` one of the tensors of `a` and `b`."""
        if isinstance(self.of_adapters, slice):
            target[self.of_adapters].add_(gradient)
        else:
            target.index_add_(0, self.of_adapters, gradient.to(target.dtype))

    def of(self, adapters: slice) -> Gradients:
        """Those of some of the segment's adapters."""
        own = self.of_adapters
        if isinstance(own, slice):
            return Gradients(self.a, self.b, slice(own.start + adapters.start, own.start + adapters.stop))
        return Gradients(self.a, self.b, own[adapters])


@dataclass(frozen=True, eq=False)
class BankSegment:
    """Consecutive tokens of a micro-batch whose adapters are in one bank, sorted by adapter.

    Attributes:
        spans: each adapter's tokens.
        a: by layer, float32 [n, rank, in_features]; of routed experts' parameters [n, experts, rank, in].
        b: by layer, float32 [n, out_features, rank], times alpha / rank; of experts likewise.
        gradients: for linear layers; None if not needed. Experts' gradients are left to autograd.
        adapters: those of the n adapters that have spans; None: all.
    """

    spans: Spans
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    gradients: Gradients | None = None
    adapters: slice | None = None

    def matrices(self, layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of a linear layer, [adapters, rank, in_features] and, transposed, [adapters, rank, out_features].

        For the grouped kernel there are zeros beyond the rank, up to a multiple that it takes.
        """
        a, b = self.a[layer], self.b[layer]
        if self.adapters is not None:
            a, b = a[self.adapters], b[self.adapters]
        a, b = a.to(dtype), b.to(dtype).transpose(1, 2).contiguous()
        if self.spans.ends is not None and (lacking := -a.shape[1] % ALIGNMENT):
            return functional.pad(a, (0, 0, 0, lacking)), functional.pad(b, (0, 0, 0, lacking))
        return a, b

    def part(self, start: int, end: int) -> BankSegment:
        """The segment of its tokens [start, end)."""
        adapters, counts = self.spans.narrow(start, end)
        a = next(iter(self.a.values()))
        kept = self.gradients and self.gradients.of(adapters)
        dtype = torch.bfloat16 if self.spans.ends is not None else a.dtype
        return BankSegment(Spans.of(counts, a.device, dtype), self.a, self.b, kept, adapters)

    def expert_term(self, experts: str, first: int | None) -> ExpertTerm | None:
        """The terms of a routed experts module, if it has any.

        Args:
            experts: the module's full name.
            first: the segment's first token in the micro-batch; None: it is the whole micro-batch.
        """
        gate_up, down = f"{experts}.{GATE_UP}", f"{experts}.{DOWN}"
        if gate_up not in self.a:
            return None
        device = self.a[gate_up].device
        counts = self.spans.counts
        if self.spans.are_equal:
            adapter = torch.arange(len(counts), device=device).repeat_interleave(counts[0])
        else:
            on_host = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            adapter = to_device(on_host, device)
        rows = None if first is None else torch.arange(first, first + self.spans.tokens, device=device)
        return ExpertTerm(rows, adapter, self.a[gate_up], self.b[gate_up], self.a[down], self.b[down])


class TrainingRoute:
    """Which tokens of the current micro-batch get which adapters' terms; without segments, the base model alone.

    Shared by all layers of a module tree; set only by the thread that computes.

    Attributes:
        segments: cover all tokens, in order.
        anchor: requires a gradient but never gets one, so that autograd visits layers whose input requires none.
    """

    def __init__(self) -> None:
        self.segments: list[BankSegment] = []
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def narrowed(self, start: int, end: int) -> Generator[None]:
        """Meanwhile the micro-batch's tokens [start, end) are all there are, for layers that get no others."""
        whole = self.segments
        parts: list[BankSegment] = []
        first = 0
        for segment in whole:
            last = first + segment.spans.tokens
            if first < end and start < last:
                parts.append(segment.part(max(start - first, 0), min(end, last) - first))
            first = last
        self.segments = parts
        try:
            yield
        finally:
            self.segments = whole

    def expert_terms(self, experts: str, rows: int) -> list[ExpertTerm]:
        """See `twinkle.server.backends.lora.experts.ExpertRoute`."""
        del rows
        terms: list[ExpertTerm] = []
        first = 0
        for segment in self.segments:
            if term := segment.expert_term(experts, first if len(self.segments) > 1 else None):
                terms.append(term)
            first += segment.spans.tokens
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
            x: the micro-batch's tokens, row-major: [..., in_features].
        """
        segments = self._route.segments
        if not any(self._name in segment.a for segment in segments):
            return functional.linear(x, self.weight, self.bias)
        product = _Product.apply(x, self.weight, self.bias, self._route.anchor, self._name, segments)
        # Not inside the Function, of whose views none may be changed in place, as Falcon does with this output.
        return cast("Tensor", product).view(*x.shape[:-1], self.weight.shape[0])


class _Product(torch.autograd.Function):
    """A linear layer and its terms as one autograd node; see `LoraLinear.forward`."""

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
        for segment, own_x, own_out in zip(segments, _own(flat, segments), _own(out, segments), strict=True):
            if layer in segment.a:
                a, b = segment.matrices(layer, x.dtype)
                low = segment.spans.down(own_x, a)
                segment.spans.add_up(own_out, low, b)
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
        grads_x = [None] * len(segments) if grad_x is None else _own(grad_x, segments)
        matrices = iter(saved)
        for segment, own_x, own_grad, own_grad_x in zip(
            segments, _own(flat, segments), _own(grad, segments), grads_x, strict=True
        ):
            if layer in segment.a:
                a, b, low = next(matrices), next(matrices), next(matrices)
                spans = segment.spans
                grad_low = spans.down(own_grad, b)
                if own_grad_x is not None:
                    spans.add_up(own_grad_x, grad_low, a)
                if (wanted := segment.gradients) is not None:
                    rank = segment.a[layer].shape[1]
                    wanted.add(wanted.a[layer], spans.outer(grad_low, own_x)[:, :rank])
                    wanted.add(wanted.b[layer], spans.outer(low, own_grad)[:, :rank].transpose(1, 2))
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, None


def _own(flat: Tensor, segments: list[BankSegment]) -> Sequence[Tensor]:
    """Each segment's part of a micro-batch's tokens, [tokens, features]."""
    return (flat,) if len(segments) == 1 else flat.split([segment.spans.tokens for segment in segments])
