"""Products of a micro-batch's tokens with their adapters' matrices: each adapter has a span of consecutive tokens.

Spans of equal length are a view, and one batched product does for all of them. Others are multiplied by torch's grouped
product, or one after the other where there is none or, on a CPU, each is large. Either way no token is padded.

What is as narrow as the rank has a form of its own, `Low`, which only this module looks into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from twinkle.server.backends.lora.transfer import to_device

Low: TypeAlias = Tensor
"""Every token's numbers in its adapter's rank: [adapters, rank, tokens of each] where spans are equal, [tokens, rank]
for a GPU's kernel, else [rank, tokens]. (On a CPU, products whose last dimension is as narrow as the rank take up to
nine times as long.)"""

# On a CPU grouped products are made one after the other too, but not by Python: that pays below this many numbers of an
# adapter, tokens x features.
_SMALL = 2**15
# Grouped products need rows of a multiple of 16 bytes: 8 bfloat16 numbers.
_ROW_BYTES = 16
ALIGNMENT = 8
# On a GPU it takes fewer groups than this.
_TOO_MANY_GROUPS = 1024


@dataclass(frozen=True, eq=False)
class Spans:
    """
    Attributes:
        counts: each adapter's tokens, at least one.
        ends: int32 [adapters], each span's end, for the grouped kernel; None: another way is taken.
    """

    counts: tuple[int, ...]
    ends: Tensor | None = None

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device, dtype: torch.dtype) -> Spans:
        """
        Args:
            dtype: of the products.
        """
        if len(set(counts)) == 1 or len(counts) >= _TOO_MANY_GROUPS or not has_grouped_kernel(device, dtype):
            return cls(tuple(counts))
        return cls(tuple(counts), to_device(cls(tuple(counts)).ends_on_host, device))

    @cached_property
    def tokens(self) -> int:
        return sum(self.counts)

    @cached_property
    def ends_on_host(self) -> Tensor:
        """int32 [adapters]."""
        return torch.tensor(list(accumulate(self.counts)), dtype=torch.int32)

    @cached_property
    def are_equal(self) -> bool:
        return len(set(self.counts)) == 1

    def narrow(self, start: int, end: int) -> tuple[slice, tuple[int, ...]]:
        """The adapters that have any of the tokens [start, end), and how many each of them has there."""
        ends = list(accumulate(self.counts))
        inside = [
            max(0, min(end, last) - max(start, last - count))
            for count, last in zip(self.counts, ends, strict=True)
        ]
        having = [i for i, count in enumerate(inside) if count]
        own = slice(having[0], having[-1] + 1)
        return own, tuple(inside[own])

    def down(self, x: Tensor, matrices: Tensor) -> Low:
        """Each token times its adapter's matrix, transposed.

        Args:
            x: [tokens, features].
            matrices: [adapters, rank, features].
        """
        if self.are_equal:
            return torch.bmm(matrices, x.view(len(self.counts), -1, x.shape[1]).transpose(1, 2))
        rank = matrices.shape[1]
        if (ends := self._ends_for_grouped(x)) is not None:
            if self.ends is None:
                return functional.grouped_mm(matrices, x.t(), offs=ends)
            return functional.grouped_mm(x, matrices.transpose(1, 2), offs=ends)
        if self.ends is None:
            low = x.new_empty(rank, len(x) + -len(x) % ALIGNMENT)[:, : len(x)]
        else:
            low = x.new_empty(len(x), rank)
        for own_low, own_x, matrix in zip(self._split(low), x.split(self.counts), matrices, strict=True):
            torch.mm(matrix, own_x.t(), out=own_low)
        return low

    def add_up(self, out: Tensor, low: Low, matrices: Tensor) -> None:
        """Add each token's low-rank numbers, times its adapter's matrix.

        Args:
            out: [tokens, features], changed in place.
            matrices: [adapters, rank, features].
        """
        if self.are_equal:
            out.view(len(self.counts), -1, out.shape[1]).baddbmm_(low.transpose(1, 2), matrices)
        elif (ends := self._ends_for_grouped(out)) is not None:
            out.add_(functional.grouped_mm(low.t() if self.ends is None else low, matrices, offs=ends))
        else:
            parts = zip(out.split(self.counts), self._split(low), matrices, strict=True)
            for own_out, own_low, matrix in parts:
                own_out.addmm_(own_low.t(), matrix)

    def outer(self, low: Low, x: Tensor) -> Tensor:
        """Low-rank numbers times x, summed over each adapter's tokens.

        Args:
            x: [tokens, features].

        Returns:
            [adapters, rank, features].
        """
        if self.are_equal:
            return torch.bmm(low, x.view(len(self.counts), -1, x.shape[1]))
        if (ends := self._ends_for_grouped(x)) is not None:
            return functional.grouped_mm(low if self.ends is None else low.t(), x, offs=ends)
        parts = self._split(low)
        found = x.new_empty(len(self.counts), len(parts[0]), x.shape[1])
        for own, own_low, own_x in zip(found, parts, x.split(self.counts), strict=True):
            torch.mm(own_low, own_x, out=own)
        return found

    def _split(self, low: Low) -> list[Tensor]:
        """[rank, tokens] of each adapter, where spans are not equal."""
        if self.ends is None:
            return list(low.split(self.counts, dim=1))
        return [own.t() for own in low.split(self.counts)]

    def _ends_for_grouped(self, x: Tensor) -> Tensor | None:
        """Each span's end, if grouped products with x, [tokens, features], are possible, and quicker."""
        if x.shape[1] * x.element_size() % _ROW_BYTES:
            return None
        if x.device.type != "cpu":
            return self.ends
        is_small = x.numel() < _SMALL * len(self.counts)
        return self.ends_on_host if is_small and _HAS_GROUPED else None


_HAS_GROUPED = hasattr(functional, "grouped_mm")  # since torch 2.10


def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU has a kernel for grouped products of this dtype: bfloat16, from compute capability 8.0."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not _HAS_GROUPED:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
