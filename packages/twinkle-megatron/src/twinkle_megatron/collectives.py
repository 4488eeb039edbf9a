"""Differentiable collectives. In a group of one rank they do nothing.

Each sends a contiguous copy of its tensor: Megatron-Core 0.16 silently drops the result of a non-contiguous one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from twinkle_megatron.groups import Group

Exchange: TypeAlias = Callable[[Tensor], Tensor]


def sum_in_backward(x: Tensor, group: Group) -> Tensor:
    """`x` unchanged; its gradient is summed over the ranks. For a value that all ranks have but use differently."""
    return _exchange(x, lambda x: x.view_as(x), lambda grad: _sum(grad, group), group)


def sum_in_forward(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' `x`; the gradient is passed on unchanged."""
    return _exchange(x, lambda x: _sum(x, group), lambda grad: grad, group)


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """Concatenates the ranks' [tokens, ...] to [ranks * tokens, ...]. Each rank gets back the sum of all ranks'
    gradients for its own tokens.
    """
    return _exchange(x, lambda x: _gather(x, group), lambda grad: _sum_and_scatter(grad, group), group)


def sum_and_scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' [ranks * tokens, ...], of which each rank keeps its own [tokens, ...]."""
    return _exchange(x, lambda x: _sum_and_scatter(x, group), lambda grad: _gather(grad, group), group)


def exchange_rows(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """All-to-all: rank r gets `sent[r]` rows of x [sum of sent, ...]; the result is [sum of received, ...]."""
    return _exchange(
        x,
        lambda x: _all_to_all(x, sent, received, group),
        lambda grad: _all_to_all(grad, received, sent, group),
        group,
    )


def _exchange(x: Tensor, forward: Exchange, backward: Exchange, group: Group) -> Tensor:
    return x if group.size == 1 else cast("Tensor", cast("Any", _Exchange).apply(x, forward, backward))


class _Exchange(Function):
    """`forward(x)`, with `backward(gradient)` as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Exchange, backward: Exchange) -> Tensor:
        ctx.exchange = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return ctx.exchange(grad), None, None


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.ranks)
    return total


def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    cast("Any", dist).all_gather_into_tensor(out, x.contiguous(), group=group.ranks)
    return out


def _sum_and_scatter(x: Tensor, group: Group) -> Tensor:
    if x.device.type == "cpu":  # gloo can only sum or scatter
        return _sum(x, group).chunk(group.size)[group.index].contiguous()
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    cast("Any", dist).reduce_scatter_tensor(out, x.contiguous(), group=group.ranks)
    return out


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group.ranks)
    return out
