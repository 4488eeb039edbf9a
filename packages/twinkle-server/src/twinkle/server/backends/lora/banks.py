"""Where adapters live: one bank for all adapters of a shape, with a few rows for each of them.

    params, exp_avg, exp_avg_sq    float32 [size] each
    grads                          float32 [size], from a pass to the step that uses it

A row holds all of the adapter's A matrices, then all its B matrices, so that in a stack of several adapters' rows one
view shows the weights of one module in all of them. An adapter takes only its own rows, whatever others there are:
nothing is allocated in advance, and nothing moves when others come or go. Owns memory and names; computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from twinkle.protocol.types import Float32Array
from twinkle.server.backends.lora.adapter_state import peft_names
from twinkle.server.backends.protocol import AdapterSpec


@dataclass(frozen=True)
class LinearShape:
    """What adapters act on: a linear layer, or a parameter with a matrix for each routed expert.

    Attributes:
        name: full name in the model.
        in_features, out_features: of the layer, or of each expert's matrix.
        experts: number of experts; None for a linear layer.
    """

    name: str
    in_features: int
    out_features: int
    experts: int | None = None


@dataclass(frozen=True)
class Place:
    """A matrix in a row, or one for each expert in sequence: elements [start, end), row-major."""

    start: int
    rows: int
    columns: int
    experts: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns * (1 if self.experts is None else self.experts)

    @property
    def shape(self) -> tuple[int, ...]:
        """[self.rows, self.columns], preceded by the number of experts if there are any."""
        return (self.rows, self.columns) if self.experts is None else (self.experts, self.rows, self.columns)

    def view(self, rows: Tensor) -> Tensor:
        """[n, size] -> [n, *self.shape], sharing memory."""
        return rows.narrow(1, self.start, self.end - self.start).view(len(rows), *self.shape)


@dataclass(frozen=True)
class Layout:
    """How an adapter of one rank over given layers is laid out in a row.

    Attributes:
        a: by layer, place of A [rank, in_features], or of all experts [experts, rank, in_features].
        b: by layer, place of B [out_features, rank], or [experts, out_features, rank]; after all A.
        b_start: where the first B begins.
        size: length of a row.
    """

    rank: int
    a: dict[str, Place]
    b: dict[str, Place]
    b_start: int
    size: int

    @staticmethod
    def of(layers: Sequence[LinearShape], rank: int) -> Layout:
        a: dict[str, Place] = {}
        b: dict[str, Place] = {}
        end = 0
        for layer in layers:
            a[layer.name] = Place(end, rank, layer.in_features, layer.experts)
            end = a[layer.name].end
        b_start = end
        for layer in layers:
            b[layer.name] = Place(end, layer.out_features, rank, layer.experts)
            end = b[layer.name].end
        return Layout(rank, a, b, b_start, end)

    @property
    def modules(self) -> list[str]:
        return list(self.a)

    def matrices(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By layer, A of all `rows` [n, size] as [n, *shape], and B; views."""
        places = (*self.a.values(), *self.b.values())
        pieces = rows.split([place.end - place.start for place in places], dim=1)
        n = rows.shape[0]
        views = [piece.view(n, *place.shape) for piece, place in zip(pieces, places, strict=True)]
        return dict(zip(self.a, views, strict=False)), dict(zip(self.b, views[len(self.a) :], strict=True))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the matrices that `split` returns and `join` takes."""
        shapes: dict[str, tuple[int, int]] = {}
        for module, a in self.a.items():
            a_name, b_name = peft_names(module)
            count = 1 if a.experts is None else a.experts
            shapes[a_name] = count * self.rank, a.columns
            shapes[b_name] = self.b[module].rows, count * self.rank
        return shapes

    def split(self, row: Tensor) -> dict[str, Float32Array]:
        """A row [size] on the CPU as PEFT's matrices; those that need no reordering share the row's memory.

        For experts these are A [experts * rank, in_features], expert by expert, and B [out_features, rank * experts],
        grouped by rank (`peft.tuners.lora.layer.ParamWrapper`).
        """
        flat: Float32Array = row.numpy()
        matrices: dict[str, Float32Array] = {}
        for module, a in self.a.items():
            a_name, b_name = peft_names(module)
            b = self.b[module]
            matrices[a_name] = flat[a.start : a.end].reshape(-1, a.columns)
            own = flat[b.start : b.end].reshape(b.shape)
            matrices[b_name] = own if b.experts is None else own.transpose(1, 2, 0).reshape(b.rows, -1)
        return matrices

    def join(self, matrices: dict[str, Float32Array]) -> Tensor:
        """The inverse of `split`: a new row [size] on the CPU."""
        row = torch.empty(self.size)
        flat: Float32Array = row.numpy()
        for module, a in self.a.items():
            a_name, b_name = peft_names(module)
            b, given = self.b[module], matrices[b_name]
            flat[a.start : a.end] = matrices[a_name].reshape(-1)
            if b.experts is not None:
                given = given.reshape(b.rows, self.rank, b.experts).transpose(2, 0, 1)
            flat[b.start : b.end] = given.reshape(-1)
        return row

    def initial_row(self, seed: int) -> Tensor:
        """A new adapter's weights [size]: A uniform within 1 / sqrt(in_features) (PEFT: Kaiming, a = sqrt 5), B zero.

        Drawn on the CPU, module by module, so that a seed gives the same adapter on any device. Experts' A are drawn as
        one matrix [experts * rank, in_features], as in PEFT.
        """
        generator = torch.Generator().manual_seed(seed % 2**63)
        row = torch.zeros(self.size)
        for place in self.a.values():
            matrix = row[place.start : place.end].view(-1, place.columns)
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
        return row


class Bank:
    """Adapters of one layout, each in a slot, a number that is its own while it exists.

    Attributes:
        params: by slot, float32 [size].
        exp_avg, exp_avg_sq: the same, for adapters that step here; of data-parallel ranks each adapter steps on one.
        grads: by slot, float32 [size], for those of them with a gradient; all others' are zero.
        steps: by slot, number of steps taken.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.params: dict[int, Tensor] = {}
        self.exp_avg: dict[int, Tensor] = {}
        self.exp_avg_sq: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}
        self.steps: dict[int, int] = {}
        self._slots = count()

    @property
    def is_empty(self) -> bool:
        return not self.params

    def take(self, steps_here: bool = True) -> int:
        """A new slot, all zeros. May raise `torch.OutOfMemoryError`: then nothing has changed."""
        rows = [torch.zeros(self.layout.size, device=self.device) for _ in range(3 if steps_here else 1)]
        slot = next(self._slots)
        self.params[slot], *moments = rows
        if steps_here:
            self.exp_avg[slot], self.exp_avg_sq[slot] = moments
        self.steps[slot] = 0
        return slot

    def steps_here(self, slot: int) -> bool:
        return slot in self.exp_avg

    def free(self, slot: int) -> None:
        """Free a slot and its memory."""
        del self.params[slot], self.steps[slot]
        for rows in (self.exp_avg, self.exp_avg_sq, self.grads):
            rows.pop(slot, None)

    def wipe(self, slot: int) -> None:
        """Set a slot to zeros, in place."""
        for rows in (self.params, self.exp_avg, self.exp_avg_sq):
            if slot in rows:
                rows[slot].zero_()
        self.grads.pop(slot, None)
        self.steps[slot] = 0

    def gradient(self, slot: int) -> Tensor:
        """float32 [size], read-only: zeros if there is none."""
        found = self.grads.get(slot)
        return torch.zeros(self.layout.size, device=self.device) if found is None else found


@dataclass(eq=False)
class Adapter:
    """A resident adapter: its shape and where it lives.

    Attributes:
        owner: the data-parallel rank that has its gradient and moments.
    """

    spec: AdapterSpec
    bank: Bank
    slot: int
    owner: int = 0

    @property
    def scale(self) -> float:
        return self.spec.alpha / self.spec.rank


def consecutive(slots: Sequence[int]) -> bool:
    """Whether `slots` counts up by one, so that rows with these numbers are one view."""
    return slots[-1] - slots[0] == len(slots) - 1 and all(
        b - a == 1 for a, b in zip(slots, slots[1:], strict=False)
    )
