"""Low-rank terms in inference: resident adapters, and the route that tells each layer which rows get whose term.

Rows come in any order. Those of all adapters of one shape are brought together, padded to equally many rows an adapter,
so that one batched matrix product each for A and B serves them all, and their terms are added where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from twinkle.server.backends.module_groups import is_expert_parameter
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.backends.transformers.expert_lora import DOWN, GATE_UP, ExpertTerm
from twinkle.server.backends.transformers.wrapped_linear import WrappedLinear

# What can share a batched matrix product: the rank, and the layers acted on.
Shape: TypeAlias = tuple[int, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """A copy of an adapter's weights.

    Attributes:
        a: by layer, [rank, in_features]; of routed experts' parameters [experts, rank, in_features].
        b: by layer, [out_features, rank], times alpha / rank; of experts [experts, out_features, rank].
    """

    shape: Shape
    a: dict[str, Tensor]
    b: dict[str, Tensor]

    @classmethod
    def of(cls, state: AdapterState, dtype: torch.dtype, device: torch.device) -> ResidentAdapter:
        scale = state.spec.alpha / state.spec.rank
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for module in state.target_modules:
            prefix = f"base_model.model.{module}"
            # torch.tensor copies: whatever becomes of the state, this stays.
            a[module] = torch.tensor(state.weights[f"{prefix}.lora_A.weight"], dtype=dtype, device=device)
            b_float = torch.tensor(state.weights[f"{prefix}.lora_B.weight"], device=device)
            b[module] = (b_float * scale).to(dtype)
            if is_expert_parameter(module):
                # See `twinkle.server.backends.transformers.banks.Layout.split`.
                rank = state.spec.rank
                a[module] = a[module].unflatten(0, (-1, rank))
                b[module] = b[module].unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()
        return cls((state.spec.rank, tuple(state.target_modules)), a, b)


@dataclass(frozen=True, eq=False)
class RouteGroup:
    """The rows of a batch whose adapters have one shape.

    Attributes:
        a, b: by layer, stacked: [adapters, rank, in_features], [adapters, out_features, rank]; of routed experts
            [adapters, experts, rank, in_features], [adapters, experts, out_features, rank].
        batch_rows: how many rows the whole batch has.
        rows: int64 [adapters, most rows of one adapter]: which rows; short ones repeat their first.
        kept: int64: which entries of `rows`, flattened, are not repetitions.
        targets: int64: `rows` flattened, at `kept`.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    batch_rows: int
    rows: Tensor
    kept: Tensor
    targets: Tensor

    def add_term(self, layer: str, x: Tensor, out: Tensor) -> None:
        """Add the low-rank term to `out` [rows, n, out_features], in place; `x` is [rows, n, in_features]."""
        if layer not in self.a:
            return
        adapters, most = self.rows.shape
        gathered = x[self.rows.flatten()].reshape(adapters, most * x.shape[1], x.shape[2])
        low = torch.bmm(gathered, self.a[layer].transpose(1, 2))
        term = torch.bmm(low, self.b[layer].transpose(1, 2)).reshape(adapters * most, *out.shape[1:])
        out.index_add_(0, self.targets, term[self.kept])

    def expert_term(self, experts: str, tokens: int) -> ExpertTerm | None:
        """The terms of a routed experts' module, if these adapters have any.

        Args:
            experts: the module's full name.
            tokens: how many all rows of the batch have together.
        """
        gate_up, down = f"{experts}.{GATE_UP}", f"{experts}.{DOWN}"
        if gate_up not in self.a:
            return None
        of_row = tokens // self.batch_rows
        positions = torch.arange(of_row, device=self.targets.device)
        rows = (self.targets.unsqueeze(1) * of_row + positions).flatten()
        adapter = (self.kept // self.rows.shape[1]).repeat_interleave(of_row)
        return ExpertTerm(rows, adapter, self.a[gate_up], self.b[gate_up], self.a[down], self.b[down])


class Route:
    """Which rows get whose term; shared by the layers of a module tree, set by the one thread that computes."""

    def __init__(self) -> None:
        self.groups: list[RouteGroup] = []

    def expert_terms(self, experts: str, rows: int) -> list[ExpertTerm]:
        """See `twinkle.server.backends.transformers.expert_lora.ExpertRoute`."""
        return [term for group in self.groups if (term := group.expert_term(experts, rows))]


class RouteMaker:
    """Makes routes, and keeps the stacked weights for as long as the same adapters are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stacks: dict[tuple[ResidentAdapter, ...], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def make(self, adapters: Sequence[ResidentAdapter | None]) -> list[RouteGroup]:
        """
        Args:
            adapters: each row's; None is the base model alone.
        """
        by_shape: dict[Shape, dict[ResidentAdapter, list[int]]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                by_shape.setdefault(adapter.shape, {}).setdefault(adapter, []).append(row)
        # Those of adapters that are no longer in use go.
        self._stacks = {tuple(rows): self._stack(tuple(rows)) for rows in by_shape.values()}
        return [self._group(len(adapters), rows, *self._stacks[tuple(rows)]) for rows in by_shape.values()]

    def make_one(self, adapter: ResidentAdapter | None) -> list[RouteGroup]:
        """The route of a single row; what is stacked for the batch is kept."""
        return [] if adapter is None else [self._group(1, {adapter: [0]}, *self._stack((adapter,)))]

    def _stack(self, adapters: tuple[ResidentAdapter, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if adapters in self._stacks:
            return self._stacks[adapters]
        if len(adapters) == 1:
            [only] = adapters
            return (
                {m: t.unsqueeze(0) for m, t in only.a.items()},
                {m: t.unsqueeze(0) for m, t in only.b.items()},
            )
        a = {module: _stacked([adapter.a[module] for adapter in adapters]) for module in adapters[0].a}
        b = {module: _stacked([adapter.b[module] for adapter in adapters]) for module in adapters[0].b}
        return a, b

    def _group(
        self,
        batch_rows: int,
        rows: dict[ResidentAdapter, list[int]],
        a: dict[str, Tensor],
        b: dict[str, Tensor],
    ) -> RouteGroup:
        most = max(len(own) for own in rows.values())
        padded = [[*own, *([own[0]] * (most - len(own)))] for own in rows.values()]
        kept = [i * most + j for i, own in enumerate(rows.values()) for j in range(len(own))]
        row_tensor = torch.tensor(padded, device=self._device)
        kept_tensor = torch.tensor(kept, device=self._device)
        return RouteGroup(a, b, batch_rows, row_tensor, kept_tensor, row_tensor.flatten()[kept_tensor])


def _stacked(matrices: list[Tensor]) -> Tensor:
    """[adapters, ...]; those of experts lie expert by expert, as `run_experts` goes through them."""
    return torch.stack(matrices, 1).transpose(0, 1) if matrices[0].ndim == 3 else torch.stack(matrices)


class RoutedLinear(WrappedLinear):
    """A frozen linear layer and, for the rows that the route names, low-rank terms."""

    def __init__(self, base: nn.Linear, name: str, route: Route) -> None:
        super().__init__(base)
        self._name = name
        self._route = route

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [rows, n, in_features], or flattened (a shared expert's)."""
        out: Tensor = self.base(x)
        for group in self._route.groups:
            if x.ndim == 3:
                group.add_term(self._name, x, out)
            else:
                rows = (group.batch_rows, -1)
                group.add_term(self._name, x.unflatten(0, rows), out.unflatten(0, rows))
        return out
