"""Low-rank terms in inference: resident adapters, and the route from rows to adapters.

Rows may be in any order. Matrices of adapters of the same shape are stacked. With few adapters, all rows are multiplied
by all A's at once, masked to each row's own columns, and multiplied by all B's: few large products are faster than many
small ones. Layers that read the same input share the first product. With many adapters that would waste too much, so
rows are grouped by adapter for one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle.server.backends.lora.adapter_state import peft_names
from twinkle.server.backends.lora.experts import DOWN, GATE_UP, ExpertTerm
from twinkle.server.backends.lora.linear import WrappedLinear
from twinkle.server.backends.lora.module_groups import is_expert_parameter
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.backends.protocol import AdapterState

# Adapters can be stacked if these are equal: the rank and the target layers.
Shape: TypeAlias = tuple[int, tuple[str, ...]]

# Layers of one module that usually read the same input; if they don't, nothing is shared.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)

# Up to this many columns of all A's (adapters * rank) one product is faster, for any number of tokens.
TOGETHER = 128
# On a GPU a decode step's time is that of starting its kernels: up to so many columns, for so many tokens.
TOGETHER_ON_GPU = 1024
FEW_TOKENS = 512

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """A copy of an adapter's weights.

    Attributes:
        family: by layer, except experts: the first layer that reads the same input, and this layer's index among those.
        a: by family, [in_features, layers, 1, rank]; of routed experts' parameters [1, experts, rank, in_features].
        b: by layer, [1, rank, out_features], times alpha / rank; of experts [1, experts, out_features, rank].
        is_finite: whether all numbers are finite.
    """

    shape: Shape
    family: dict[str, tuple[str, int]]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    is_finite: bool

    @classmethod
    def of(cls, state: AdapterState, dtype: torch.dtype, device: torch.device) -> ResidentAdapter:
        rank = state.spec.rank
        scale = state.spec.alpha / rank
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        names = [name for layer in state.target_modules for name in peft_names(layer)]
        # A copy, so later changes of the state have no effect; in one piece, so that a GPU has to be waited for once.
        host = torch.from_numpy(np.concatenate([state.weights[name].ravel() for name in names]))
        is_finite = _is_finite(_matrices(state, names, host), scale, dtype)
        matrices = iter(_matrices(state, names, host.to(device)))
        for layer, a_float, b_float in zip(state.target_modules, matrices, matrices, strict=True):
            a_own, b_own = a_float.to(dtype), (b_float * scale).to(dtype)
            if is_expert_parameter(layer):
                # See `twinkle.server.backends.lora.banks.Layout.split`.
                a[layer] = a_own.unflatten(0, (-1, rank)).unsqueeze(0).clone()
                b[layer] = b_own.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous().unsqueeze(0)
            else:
                a[layer], b[layer] = a_own, b_own.t().contiguous().unsqueeze(0)
        by_family = families({layer: matrix for layer, matrix in a.items() if matrix.ndim == 2})
        for first, layers in by_family.items():
            a[first] = torch.stack([a.pop(layer).t() for layer in layers], dim=1).unsqueeze(2)
        return cls(
            (rank, tuple(state.target_modules)),
            {layer: (first, i) for first, layers in by_family.items() for i, layer in enumerate(layers)},
            a,
            b,
            is_finite,
        )


def _matrices(state: AdapterState, names: Sequence[str], flat: Tensor) -> list[Tensor]:
    """Views of `flat`, in which the matrices of these names stand one behind the other."""
    shapes = [state.weights[name].shape for name in names]
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _is_finite(matrices: Sequence[Tensor], scale: float, dtype: torch.dtype) -> bool:
    """Whether A's and scaled B's, in turns, are finite in `dtype`: their largest and smallest numbers say so.

    Of the matrices on the host: a GPU would have to be waited for.
    """
    ends = torch.stack([torch.stack(matrix.aminmax()) for matrix in matrices])
    ends[1::2] *= scale
    return bool(ends.to(dtype).isfinite().all())


def families(a: dict[str, Tensor]) -> dict[str, list[str]]:
    """Layers grouped by their input, by the name of the first.

    Args:
        a: by layer, [rank, in_features].
    """
    found: dict[tuple[str, tuple[str, ...], int], list[str]] = {}
    for layer, matrix in a.items():
        parent, _, own = layer.rpartition(".")
        names = next((names for names in SIBLINGS if own in names), (own,))
        found.setdefault((parent, names, matrix.shape[1]), []).append(layer)
    return {layers[0]: layers for layers in found.values()}


@dataclass(frozen=True, eq=False)
class LayerTerm:
    """A layer's matrices for one product over all slots.

    Attributes:
        family, number: as in `ResidentAdapter.family`.
        layers: of the family.
        columns: slots * rank; 0 if every column is every row's own, so that nothing is computed in vain.
        a: of the family [in_features, layers * slots * rank].
        b: [slots * rank, out_features].
        own: `RouteGroup.own`, repeated for each layer of the family.
    """

    family: str
    number: int
    layers: int
    columns: int
    a: Tensor
    b: Tensor
    own: Tensor | None


@dataclass(eq=False)
class RouteGroup:
    """The rows of a batch whose adapters have one shape.

    Attributes:
        a, b: by family and by layer, stacked: [layers, slots, rank, in_features], [slots, rank, out_features]; of
            routed experts [slots, experts, rank, in_features], [slots, experts, out_features, rank].
        family: as in `ResidentAdapter`.
        batch_rows: number of rows of the whole batch.
        own: bit mask [batch_rows, 1, slots * rank] in integers of the weights' width: all ones in a row's own columns,
            else zeros; None if every column is every row's own.
        used: int64 [adapters], the slots of adapters with rows; None: all slots.
        rows: int64 [adapters, most rows of an adapter], each adapter's rows, padded with its first.
        kept: int64, indices into the flattened `rows` that are not padding.
        targets: int64, the flattened `rows` at `kept`.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    family: dict[str, tuple[str, int]]
    batch_rows: int
    own: Tensor | None
    used: Tensor | None
    rows: Tensor
    kept: Tensor
    targets: Tensor
    _terms: dict[str, LayerTerm] = field(default_factory=dict[str, LayerTerm], init=False)
    # The last family's product, which its other layers share: the family, its input, and each layer's part.
    _latest: tuple[str, Tensor, tuple[Tensor, ...]] | None = field(default=None, init=False)

    def add_term(self, layer: str, x: Tensor, out: Tensor) -> None:
        """Add the low-rank term to `out` [tokens, out_features], in place.

        Args:
            x: [rows, n, in_features], or [tokens, in_features], of all rows in order.
        """
        term = self._terms.get(layer) or self._made_term(layer)
        if term is None:
            return
        if term.columns <= TOGETHER or (term.columns <= TOGETHER_ON_GPU and _has_few_tokens(out)):
            latest = self._latest
            if latest is None or latest[1] is not x or latest[0] != term.family:
                latest = self._latest = (term.family, x, self._all_low(term, x))
            out.addmm_(latest[2][term.number], term.b)
        else:
            self._add_by_adapter(layer, x, out)

    def _made_term(self, layer: str) -> LayerTerm | None:
        if layer not in self.family:
            return None
        family, number = self.family[layer]
        a = self.a[family]
        width, layers, slots, rank = a.shape
        columns = slots * rank if self.own is not None else 0
        own = next((term.own for term in self._terms.values() if term.layers == layers), None)
        if own is None and self.own is not None:
            own = self.own.repeat(1, 1, layers)
        term = LayerTerm(
            family, number, layers, columns, a.view(width, -1), self.b[layer].view(slots * rank, -1), own
        )
        self._terms[layer] = term
        return term

    def _all_low(self, term: LayerTerm, x: Tensor) -> tuple[Tensor, ...]:
        """For each layer of a family: x times all A's, masked to each row's own: [tokens, slots * rank]."""
        low = torch.mm(x.reshape(-1, x.shape[-1]), term.a)
        if term.own is not None:
            # Masked bitwise: multiplying by 0 would let another adapter's infinity through as NaN.
            low.view(self.batch_rows, -1, low.shape[1]).view(term.own.dtype).bitwise_and_(term.own)
        return low.chunk(term.layers, dim=1) if term.layers > 1 else (low,)

    def _add_by_adapter(self, layer: str, x: Tensor, out: Tensor) -> None:
        """One product for each adapter, over its own rows, in a batch."""
        family, number = self.family[layer]
        a, b = self.a[family][:, number].permute(1, 0, 2), self.b[layer]
        if self.used is not None:
            a, b = a[self.used], b[self.used]
        adapters, most = self.rows.shape
        width = x.shape[-1]
        of_row = x.reshape(self.batch_rows, -1, width)
        low = torch.bmm(of_row[self.rows.flatten()].view(adapters, -1, width), a)
        term = torch.bmm(low, b).view(adapters * most, -1, out.shape[1])
        out.view(self.batch_rows, -1, out.shape[1]).index_add_(0, self.targets, term[self.kept])

    def expert_term(self, experts: str, tokens: int) -> ExpertTerm | None:
        """The terms of a routed experts module, if these adapters have any.

        Args:
            experts: the module's full name.
            tokens: total of the batch's rows.
        """
        gate_up, down = f"{experts}.{GATE_UP}", f"{experts}.{DOWN}"
        if gate_up not in self.b:
            return None
        of_row = tokens // self.batch_rows
        positions = torch.arange(of_row, device=self.targets.device)
        rows = (self.targets.unsqueeze(1) * of_row + positions).flatten()
        adapter = self.kept // self.rows.shape[1]
        slot = adapter if self.used is None else self.used[adapter]
        return ExpertTerm(
            rows, slot.repeat_interleave(of_row), self.a[gate_up], self.b[gate_up], self.a[down], self.b[down]
        )


def _has_few_tokens(out: Tensor) -> bool:
    return out.device.type == "cuda" and out.shape[0] <= FEW_TOKENS


class Route:
    """Which rows get which adapter's term. Shared by all layers; set only by the thread that computes."""

    def __init__(self) -> None:
        self.groups: list[RouteGroup] = []

    def expert_terms(self, experts: str, rows: int) -> list[ExpertTerm]:
        """See `twinkle.server.backends.lora.experts.ExpertRoute`."""
        return [term for group in self.groups if (term := group.expert_term(experts, rows))]


class AdapterStack:
    """Stacked matrices of adapters of one shape; free slots are reused.

    Attributes:
        slots: the adapter in each slot; None: free.
        a, b: see `RouteGroup`.
    """

    def __init__(self, adapters: Sequence[ResidentAdapter], slots: int) -> None:
        first = adapters[0]
        self.slots: list[ResidentAdapter | None] = [None] * slots
        self.a = {name: _room_for(name, matrix, slots) for name, matrix in first.a.items()}
        self.b = {name: _room_for(name, matrix, slots) for name, matrix in first.b.items()}
        for adapter in adapters:
            self._put(adapter)

    def assign(self, adapters: Sequence[ResidentAdapter]) -> bool:
        """Give slots to adapters without one. Returns False, changing nothing, if there are too few."""
        new = [adapter for adapter in adapters if adapter not in self.slots]
        if len(new) > self.slots.count(None):
            return False
        for adapter in new:
            self._put(adapter)
        return True

    def _put(self, adapter: ResidentAdapter) -> None:
        slot = self.slots.index(None)
        self.slots[slot] = adapter
        for stacked, own in ((self.a, adapter.a), (self.b, adapter.b)):
            for name, matrix in own.items():
                stacked[name].narrow(_dimension(name, matrix), slot, 1).copy_(matrix)


def _dimension(name: str, matrix: Tensor) -> int:
    """The dimension of the slots: the third of a family's A's, otherwise the first."""
    return 2 if matrix.ndim == 4 and not is_expert_parameter(name) else 0


def _room_for(name: str, matrix: Tensor, slots: int) -> Tensor:
    if is_expert_parameter(name):  # contiguous by expert, the order in which `run_experts` reads them
        return matrix.new_zeros(matrix.shape[1], slots, *matrix.shape[2:]).transpose(0, 1)
    shape = list(matrix.shape)
    shape[_dimension(name, matrix)] = slots
    return matrix.new_zeros(shape)


class RouteMaker:
    """Makes routes, and keeps the stacks of adapters in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stacks: dict[Shape, AdapterStack] = {}

    def make(self, adapters: Sequence[ResidentAdapter | None]) -> list[RouteGroup]:
        """
        Args:
            adapters: each row's; None: the base model alone.
        """
        by_shape: dict[Shape, dict[ResidentAdapter, list[int]]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                by_shape.setdefault(adapter.shape, {}).setdefault(adapter, []).append(row)
        return [self._group(len(adapters), shape, rows) for shape, rows in by_shape.items()]

    def keep(self, adapters: AbstractSet[ResidentAdapter | None]) -> None:
        """Free the slots of all other adapters."""
        for shape, stack in list(self._stacks.items()):
            stack.slots = [adapter if adapter in adapters else None for adapter in stack.slots]
            if 4 * (len(stack.slots) - stack.slots.count(None)) <= len(stack.slots):
                del self._stacks[shape]  # mostly empty, and products are over all slots

    def _group(self, batch_rows: int, shape: Shape, rows: dict[ResidentAdapter, list[int]]) -> RouteGroup:
        if len(rows) == 1:
            [(only, own)] = rows.items()
            return self._of_slots(only, only.a, only.b, batch_rows, [own])
        stack = self._stacks.get(shape)
        if stack is None:
            stack = self._stacks[shape] = AdapterStack(list(rows), len(rows))
        elif not stack.assign(list(rows)):
            all_of_them = [*rows, *(adapter for adapter in stack.slots if adapter and adapter not in rows)]
            slots = max(len(all_of_them), 2 * len(stack.slots))
            stack = self._stacks[shape] = AdapterStack(all_of_them, slots)
        by_slot = [rows.get(adapter, []) if adapter else [] for adapter in stack.slots]
        return self._of_slots(next(iter(rows)), stack.a, stack.b, batch_rows, by_slot)

    def _of_slots(
        self,
        like: ResidentAdapter,
        a: dict[str, Tensor],
        b: dict[str, Tensor],
        batch_rows: int,
        rows: list[list[int]],
    ) -> RouteGroup:
        """
        Args:
            like: any of the adapters.
            rows: by slot.
        """
        rank = like.shape[0]
        used = [slot for slot, own in enumerate(rows) if own]
        most = max(len(own) for own in rows)
        filled = self._tensor([[*rows[slot], *([rows[slot][0]] * (most - len(rows[slot])))] for slot in used])
        kept = self._tensor([i * most + j for i, slot in enumerate(used) for j in range(len(rows[slot]))])
        targets = filled.flatten()[kept]
        own: Tensor | None = None
        if most < batch_rows:
            slot_of_row = torch.full((batch_rows, 1, 1), -1, device=self._device)
            slot_of_row[targets, 0, 0] = self._tensor([slot for slot in used for _ in rows[slot]])
            mine = torch.arange(len(rows), device=self._device).repeat_interleave(rank) == slot_of_row
            own = -mine.to(_BITS[next(iter(b.values())).dtype])
        some = None if len(used) == len(rows) else self._tensor(used)
        return RouteGroup(a, b, like.family, batch_rows, own, some, filled, kept, targets)

    def _tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return to_device(torch.tensor(numbers), self._device)


class RoutedLinear(WrappedLinear):
    """A frozen linear layer, plus low-rank terms on the rows that the route names."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__(base)
        self._name = name
        self._route = route

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [rows, n, in_features], or flattened in a shared expert."""
        base = self.base
        out = functional.linear(x, base.weight, base.bias)
        if groups := self._route.groups:
            flat = out.view(-1, out.shape[-1])
            for group in groups:
                group.add_term(self._name, x, flat)
        return out
