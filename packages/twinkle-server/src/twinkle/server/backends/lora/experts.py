"""Routed experts of a mixture of experts, with the low-rank terms of many adapters.

For a token x that the router sends to expert e with weight p, and an adapter with terms on both of its matrices,

    h = (W1[e] + (alpha / rank) B1[e] A1[e]) x,     (gate, up) = h,
    y = (W2[e] + (alpha / rank) B2[e] A2[e]) (act(gate) * up),      out = sum over the token's experts of p y

as in Transformers (`modeling_qwen3_moe.Qwen3MoeExperts`) with PEFT's LoRA on each expert's matrices
(`peft.tuners.lora.layer.ParamWrapper`). Rows are sorted by expert once, so that each product is over consecutive groups
of rows. `run_experts` takes plain tensors, for use by other backends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle.server.backends.lora.module_groups import EXPERT_PARAMETERS

GATE_UP, DOWN = EXPERT_PARAMETERS

# torch's grouped_mm needs rows of a multiple of 16 bytes: 8 bfloat16 numbers.
_ALIGNMENT = 8
# On a GPU it takes fewer than 1024 groups.
_MOST_GROUPS = 1023


@dataclass(frozen=True, eq=False)
class ExpertTerm:
    """Low-rank terms of adapters of the same rank, on all experts of a layer.

    Attributes:
        rows: int64 [m], the input rows that get a term, without duplicates; None: all, in order.
        adapter: int64 [m], each row's index into the adapters below.
        gate_up_a: [adapters, experts, rank, hidden].
        gate_up_b: [adapters, experts, 2 * intermediate, rank], times alpha / rank.
        down_a: [adapters, experts, rank, intermediate].
        down_b: [adapters, experts, hidden, rank], times alpha / rank.
    """

    rows: Tensor | None
    adapter: Tensor
    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor


def run_experts(
    x: Tensor,
    expert: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    terms: Sequence[ExpertTerm] = (),
) -> Tensor:
    """The experts' outputs before weighting; differentiable in `x` and the terms' matrices.

    Args:
        x: [n, hidden]; n may be 0.
        expert: int64 [n] or [n, k], each row's experts.
        gate_up: [experts, 2 * intermediate, hidden], the gate's rows first; dtype of `x`.
        down: [experts, hidden, intermediate]; dtype of `x`.
        act: the gate's activation, elementwise.
        terms: with disjoint rows; matrices of any float dtype, cast to that of `x`.

    Returns:
        [n, hidden] or [n, k, hidden], dtype of `x`.
    """
    copies = expert.shape[1] if expert.ndim == 2 else 1
    by_kernel = _has_kernel(x, gate_up, down)
    plan = _plan(expert.flatten(), copies, len(gate_up), terms, by_kernel)
    first = [_Factors.of(term.gate_up_a, term.gate_up_b, x.dtype, by_kernel) for term in terms]
    second = [_Factors.of(term.down_a, term.down_b, x.dtype, by_kernel) for term in terms]
    rows = x.index_select(0, plan.order // copies if copies > 1 else plan.order)
    gate, up = _product(rows, gate_up, first, plan).chunk(2, dim=-1)
    out = _product(act(gate) * up, down, second, plan)
    return out.index_select(0, plan.inverse).view(*expert.shape, down.shape[1])


# ---------------------------------------------------------------- which rows go together


@dataclass(frozen=True, eq=False)
class _Groups:
    """Consecutive rows that share a matrix, one possibly empty group per matrix.

    Attributes:
        ends: int32 [groups], each group's end.
        sizes: each group's number of rows, on the host, for a loop; None if torch's kernel is used, which takes `ends`.
    """

    ends: Tensor
    sizes: list[int] | None

    @classmethod
    def of(cls, group: Tensor, count: int, by_kernel: bool) -> _Groups:
        """Groups of rows in any order; `group` is int64 [n]."""
        # bincount would synchronize with the GPU.
        sizes = torch.zeros(count, dtype=torch.int64, device=group.device)
        sizes.scatter_add_(0, group, torch.ones_like(group))
        return cls(sizes.cumsum(0).to(torch.int32), None if by_kernel else sizes.tolist())


@dataclass(frozen=True, eq=False)
class _Plan:
    """Rows sorted by expert, then by adapter.

    Attributes:
        order: int64 [n * k], each sorted row's original index.
        inverse: int64 [n * k], each row's sorted index.
        experts: the sorted rows' groups, one per expert.
        members: for each term the sorted indices of its rows, ascending; None: all rows.
        member_groups: for each term its rows' groups, numbered `expert * adapters + adapter`.
    """

    order: Tensor
    inverse: Tensor
    experts: _Groups
    members: list[Tensor | None]
    member_groups: list[_Groups]


def _plan(expert: Tensor, copies: int, experts: int, terms: Sequence[ExpertTerm], by_kernel: bool) -> _Plan:
    """`expert` is int64 [n * copies]; the terms' rows index n."""
    numbered = [_copied(term, copies) for term in terms]
    key = expert
    if terms:
        code, first = torch.zeros_like(expert), 0
        for term, (rows, adapter) in zip(terms, numbered, strict=True):
            if rows is None:
                code = adapter + first
            else:
                code[rows] = adapter + first
            first += len(term.gate_up_a)
        key = expert * first + code
    order = key.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    members: list[Tensor | None] = []
    groups: list[_Groups] = []
    for term, (rows, adapter) in zip(terms, numbered, strict=True):
        adapters = len(term.gate_up_a)
        own = expert if rows is None else expert[rows]
        members.append(None if rows is None else inverse[rows].sort().values)
        groups.append(_Groups.of(own * adapters + adapter, experts * adapters, by_kernel))
    return _Plan(order, inverse, _Groups.of(expert, experts, by_kernel), members, groups)


def _copied(term: ExpertTerm, copies: int) -> tuple[Tensor | None, Tensor]:
    """A term's rows and adapters after each row is repeated `copies` times."""
    if copies == 1:
        return term.rows, term.adapter
    adapter = term.adapter.repeat_interleave(copies)
    if term.rows is None:
        return None, adapter
    return (term.rows.unsqueeze(1) * copies + torch.arange(copies, device=adapter.device)).flatten(), adapter


# ---------------------------------------------------------------- products


@dataclass(frozen=True, eq=False)
class _Factors:
    """A term's matrices by group, as in `_Plan.member_groups`: [groups, rank, in] and [groups, out, rank]."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, dtype: torch.dtype, by_kernel: bool) -> _Factors:
        # At most one copy: made by the cast, or by flatten if there is nothing to cast.
        a, b = (
            matrices.transpose(0, 1).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
            for matrices in (a, b)
        )
        if by_kernel and (missing := -a.shape[1] % _ALIGNMENT):
            a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
        return cls(a, b)


def _product(x: Tensor, weight: Tensor, factors: Sequence[_Factors], plan: _Plan) -> Tensor:
    """Sorted rows [n, in] times their experts' matrices, plus terms: [n, out]."""
    out = _grouped_product(x, weight, plan.experts)
    for own, members, groups in zip(factors, plan.members, plan.member_groups, strict=True):
        rows = x if members is None else x.index_select(0, members)
        low = _grouped_product(rows, own.a, groups)
        term = _grouped_product(low, own.b, groups)
        out = out + term if members is None else out.index_add(0, members, term)
    return out


def _grouped_product(x: Tensor, weight: Tensor, groups: _Groups) -> Tensor:
    """x[i] @ weight[g].T for the rows i of each group g.

    Args:
        x: [n, in].
        weight: [groups, out, in], same dtype.
    """
    if len(x) == 0:
        # Keeps `x` in the graph: if it was received from other ranks, its backward pass is a collective.
        return functional.linear(x, weight[0])
    if groups.sizes is None:
        if weight.requires_grad:
            # The kernel leaves the gradient of an empty group undefined.
            sizes = groups.ends.diff(prepend=groups.ends.new_zeros(1))
            empty = (sizes == 0).view(-1, 1, 1)
            weight = weight.view_as(weight)
            weight.register_hook(lambda gradient: gradient.masked_fill(empty, 0))
        if len(weight) <= _MOST_GROUPS:
            return _by_kernel(x, weight, groups.ends)
        return _by_kernel_in_parts(x, weight, groups.ends)
    filled = [i for i, size in enumerate(groups.sizes) if size]
    # unbind: the backward pass of indexing would allocate a full-size gradient per group.
    matrices = weight.unbind(0)
    pieces = x.split([groups.sizes[i] for i in filled])
    return torch.cat([functional.linear(piece, matrices[i]) for i, piece in zip(filled, pieces, strict=True)])


def _by_kernel(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return cast("Tensor", cast("Any", functional).grouped_mm(x, weight.transpose(1, 2), offs=ends))


def _by_kernel_in_parts(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same of more groups than the kernel takes: some at a time, behind a group of zeros for rows before theirs.

    Where a part's groups begin isn't known on the host, and to ask a GPU would make it wait.
    """
    row = torch.arange(len(x), device=x.device).unsqueeze(1)
    nothing = weight.new_zeros(1, *weight.shape[1:])
    begin, out = ends.new_zeros(1), x.new_zeros(len(x), weight.shape[1])
    for first in range(0, len(weight), _MOST_GROUPS - 1):
        of_part = slice(first, first + _MOST_GROUPS - 1)
        part_ends = torch.cat([begin, ends[of_part]])
        own = (row >= begin) & (row < part_ends[-1])
        # Rows of other parts as zeros: none of their numbers, finite or not, gets into these groups' gradients.
        part = _by_kernel(x.masked_fill(~own, 0), torch.cat([nothing, weight[of_part]]), part_ends)
        out = torch.where(own, part, out)  # rows behind the part's are undefined
        begin = part_ends[-1:]
    return out


def has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies rows with their experts' matrices in one kernel: since 2.10 in bfloat16, on a GPU of
    compute capability 8.0 or above.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _has_kernel(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    sizes = (*gate_up.shape[1:], *down.shape[1:])
    return has_grouped_product(x.device, x.dtype) and all(s % _ALIGNMENT == 0 for s in sizes)


# ---------------------------------------------------------------- in a model


class ExpertRoute(Protocol):
    """Which rows of the current micro-batch get which adapters' terms."""

    def expert_terms(self, experts: str, rows: int) -> list[ExpertTerm]:
        """
        Args:
            experts: full name of an experts module.
            rows: number of rows of its input: the micro-batch's tokens, row-major.
        """
        ...


class ExpertsWithLora(nn.Module):
    """A frozen experts module of Transformers, plus the low-rank terms that the route names."""

    def __init__(self, base: nn.Module, name: str, route: ExpertRoute) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._route = route

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: [n, hidden], the micro-batch's tokens, row-major.
            top_k_index: int64 [n, k].
            top_k_weights: [n, k].

        Returns:
            [n, hidden].
        """
        base = cast("Any", self.base)
        terms = self._route.expert_terms(self._name, len(hidden_states))
        if not terms:
            return base(hidden_states, top_k_index, top_k_weights)
        out = run_experts(hidden_states, top_k_index, base.gate_up_proj, base.down_proj, base.act_fn, terms)
        return (out * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)
