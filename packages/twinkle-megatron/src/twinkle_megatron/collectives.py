"""Exchanges between ranks that autograd goes through in both directions.

Each makes its tensor contiguous before it leaves: of a tensor that isn't, Megatron-Core 0.16 drops the result silently.
A group of one rank is a no-op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from twinkle_megatron.groups import Group


def sum_in_backward(x: Tensor, group: Group) -> Tensor:
    """`x` as it is; its gradient is the sum of all ranks'. For a value that is the same on all of them, and is used by
    each in another way.
    """
    return x if group.size == 1 else cast("Tensor", cast("Any", _SumInBackward).apply(x, group))


def sum_in_forward(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' `x`; each gets the sum's gradient as it is."""
    return x if group.size == 1 else cast("Tensor", cast("Any", _SumInForward).apply(x, group))


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """[tokens, ...] of each rank, one after the other: [ranks * tokens, ...]. Each rank gets back the sum of all ranks'
    gradients for its own tokens.
    """
    return x if group.size == 1 else cast("Tensor", cast("Any", _GatherTokens).apply(x, group))


def sum_and_scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' [ranks * tokens, ...]; each keeps its own tokens of it: [tokens, ...]."""
    return x if group.size == 1 else cast("Tensor", cast("Any", _ScatterTokens).apply(x, group))


def exchange_rows(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """All to all: `sent[r]` of the rows of x [sum of sent, ...] go to rank r; [sum of received, ...] come from all."""
    if group.size == 1:
        return x
    return cast("Tensor", cast("Any", _ExchangeRows).apply(x, list(sent), list(received), group))


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.ranks)
    return total


def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    cast("Any", dist).all_gather_into_tensor(out, x.contiguous(), group=group.ranks)
    return out


def _sum_and_scatter(x: Tensor, group: Group) -> Tensor:
    if x.device.type == "cpu":  # gloo sums and scatters by the one or by the other alone
        return _sum(x, group).chunk(group.size)[group.index].contiguous()
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    cast("Any", dist).reduce_scatter_tensor(out, x.contiguous(), group=group.ranks)
    return out


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group.ranks)
    return out


# pyright reads torch's Function as it was written for contexts of any kind.
# pyright: reportIncompatibleMethodOverride=false


class _SumInBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _SumInForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        del ctx
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad, None


class _GatherTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_and_scatter(grad, ctx.group), None


class _ScatterTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum_and_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


class _ExchangeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None
