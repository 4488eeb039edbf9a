"""Where adapters live: one bank for all adapters of a shape, one row of it for each adapter.

    params, grads, exp_avg, exp_avg_sq    float32 [slots, size]
    steps                                 one int a slot

A row holds all A matrices of the adapter, then all B matrices, so that the weights of one module in all slots are a
view of a bank and an adapter's whole state is four contiguous vectors. Owns memory and names; computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twinkle.protocol.types import Float32Array

# A bank doubles when it is full, but takes at most this much at once (bytes, in each of its four tensors).
_MAX_GROWTH = 256 * 2**20


@dataclass(frozen=True)
class LinearShape:
    """A linear layer that adapters act on: its full name in the model, and its sizes."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Place:
    """A matrix in a row: elements [start, start + rows * columns), row-major."""

    start: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns

    def view(self, rows: Tensor) -> Tensor:
        """[n, size] -> [n, self.rows, self.columns], sharing memory."""
        return rows[:, self.start : self.end].unflatten(1, (self.rows, self.columns))


@dataclass(frozen=True)
class Layout:
    """How an adapter of one rank over given layers is laid out in a row.

    Attributes:
        a: by layer, where A [rank, in_features] is.
        b: by layer, where B [out_features, rank] is; behind all A.
        b_start: where the first B begins.
        size: length of a row.
    """

    rank: int
    a: dict[str, Place]
    b: dict[str, Place]
    b_start: int
    size: int

    @classmethod
    def of(cls, layers: Sequence[LinearShape], rank: int) -> Layout:
        a: dict[str, Place] = {}
        b: dict[str, Place] = {}
        end = 0
        for layer in layers:
            a[layer.name] = Place(end, rank, layer.in_features)
            end = a[layer.name].end
        b_start = end
        for layer in layers:
            b[layer.name] = Place(end, layer.out_features, rank)
            end = b[layer.name].end
        return cls(rank, a, b, b_start, end)

    @property
    def modules(self) -> list[str]:
        return list(self.a)

    def places(self) -> dict[str, Place]:
        """All matrices by their PEFT names."""
        named: dict[str, Place] = {}
        for module in self.a:
            named[f"base_model.model.{module}.lora_A.weight"] = self.a[module]
            named[f"base_model.model.{module}.lora_B.weight"] = self.b[module]
        return named

    def split(self, row: Tensor) -> dict[str, Float32Array]:
        """A row [size] on the CPU as matrices by PEFT name; they share the row's memory."""
        flat: Float32Array = row.numpy()
        return {
            name: flat[place.start : place.end].reshape(place.rows, place.columns)
            for name, place in self.places().items()
        }

    def join(self, matrices: dict[str, Float32Array]) -> Tensor:
        """The inverse of `split`: a new row [size] on the CPU."""
        row = torch.empty(self.size)
        flat: Float32Array = row.numpy()
        for name, place in self.places().items():
            flat[place.start : place.end] = matrices[name].reshape(-1)
        return row


def initial_row(layout: Layout, seed: int) -> Tensor:
    """A new adapter's weights [size]: A uniform within 1 / sqrt(in_features) (PEFT: Kaiming, a = sqrt 5), B zero.

    Drawn on the CPU, module by module, so that a seed gives the same adapter on any device.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    row = torch.zeros(layout.size)
    for place in layout.a.values():
        nn.init.kaiming_uniform_(place.view(row.unsqueeze(0))[0], a=math.sqrt(5), generator=generator)
    return row


class Bank:
    """Adapters of one layout, each in a slot. Free slots hold zeros."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.steps: list[int] = []
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(0, layout.size, device=device) for _ in range(4)
        )
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        return len(self.steps)

    @property
    def is_empty(self) -> bool:
        return len(self._free) == self.capacity

    def take(self) -> int:
        """The lowest free slot; its rows are zero. May raise `torch.OutOfMemoryError`: then nothing has changed."""
        if not self._free:
            self._grow()
        return self._free.pop(0)

    def free(self, slot: int) -> None:
        """Wipe a slot and let others have it."""
        self.wipe(slot)
        self._free = sorted([*self._free, slot])

    def wipe(self, slot: int) -> None:
        for tensor in (self.params, self.grads, self.exp_avg, self.exp_avg_sq):
            tensor[slot].zero_()
        self.steps[slot] = 0

    def _grow(self) -> None:
        before = self.capacity
        more = max(1, min(before, _MAX_GROWTH // (4 * max(1, self.layout.size))))
        old = (self.params, self.grads, self.exp_avg, self.exp_avg_sq)
        new = [tensor.new_zeros(before + more, self.layout.size) for tensor in old]
        for source, target in zip(old, new, strict=True):
            target[:before] = source
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = new
        self.steps += [0] * more
        self._free += range(before, before + more)


def consecutive(slots: Sequence[int]) -> bool:
    """Whether `slots` counts up by one, so that its rows are one view of a bank."""
    return slots[-1] - slots[0] == len(slots) - 1 and all(
        b - a == 1 for a, b in zip(slots, slots[1:], strict=False)
    )
