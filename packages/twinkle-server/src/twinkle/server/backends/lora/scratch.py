"""A pass's gradients, kept apart and added to the adapters' at its very end: a failed pass has changed nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from twinkle.server.backends.lora.banks import Adapter, Bank, consecutive
from twinkle.server.backends.lora.linear import BankSegment, Gradients
from twinkle.server.backends.lora.spans import Spans
from twinkle.server.backends.lora.transfer import to_device


class BankScratch:
    """One bank's adapters that take part in a pass, with their gradients from this pass, float32 [adapters, size]."""

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], keeps_gradients: bool) -> None:
        by_slot = {adapter.slot: adapter.scale for adapter in adapters}
        self.bank = bank
        self._slots = sorted(by_slot)
        self._index = {slot: i for i, slot in enumerate(self._slots)}
        self._scales = to_device(
            torch.tensor([by_slot[slot] for slot in self._slots]), bank.device
        ).unsqueeze(1)
        count = len(self._slots) if keeps_gradients else 0
        self._grads = torch.zeros(count, bank.layout.size, device=bank.device)
        self._grads_a, self._grads_b = bank.layout.matrices(self._grads)

    def segment(
        self, slots: Sequence[int], lengths: Sequence[int], needs_grad: bool, dtype: torch.dtype
    ) -> BankSegment:
        """The route of consecutive rows, whose adapters are in `slots`, ascending.

        Gradients that flow into its matrices are added to the scratch.

        Args:
            lengths: each row's tokens.
            dtype: of the products.
        """
        members, a, b = self._weights(slots)
        counts: dict[int, int] = dict.fromkeys(members, 0)
        for slot, length in zip(slots, lengths, strict=True):
            counts[self._index[slot]] += length
        device = self._grads.device
        gradients = None
        if needs_grad:
            gradients = Gradients(self._grads_a, self._grads_b, _rows(members, device))
            of_experts = {module for module, place in self.bank.layout.a.items() if place.experts is not None}
            self._collect(members, a, b, of_experts)
        return BankSegment(Spans.of(list(counts.values()), device, dtype), a, b, gradients)

    def leaves(self, slots: Sequence[int], needs_grad: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The matrices A and (scaled) B of the adapters in `slots`, by layer, for autograd to find their gradients.

        They are leaves of the graph, stacked in the order of their slots; their gradients are added to the scratch.
        """
        members, a, b = self._weights(slots)
        if needs_grad:
            self._collect(members, a, b, a)
        return a, b

    def _weights(self, slots: Sequence[int]) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
        """Which of the scratch's adapters are in `slots`, ascending, and copies of their matrices, B's scaled."""
        members = sorted({self._index[slot] for slot in slots})
        weights = torch.stack([self.bank.params[self._slots[member]] for member in members])
        scales = self._scales[_rows(members, self._scales.device)]
        weights[:, self.bank.layout.b_start :].mul_(scales)
        return members, *self.bank.layout.matrices(weights)

    def _collect(
        self, members: list[int], a: dict[str, Tensor], b: dict[str, Tensor], modules: Iterable[str]
    ) -> None:
        """Have leaves' gradients added to the scratch, and released, as soon as they exist.

        Each matrix is a leaf of its own: as a slice of one leaf, its gradient would be padded with zeros to full size.
        """
        rows = _rows(members, self._grads.device)
        for module in modules:
            for leaf, target in ((a[module], self._grads_a[module]), (b[module], self._grads_b[module])):
                gradients = Gradients({}, {}, rows)

                def move(leaf: Tensor, target: Tensor = target, gradients: Gradients = gradients) -> None:
                    assert leaf.grad is not None
                    gradients.add(target, leaf.grad)
                    leaf.grad = None

                leaf.requires_grad_().register_post_accumulate_grad_hook(move)

    @property
    def grads(self) -> Tensor:
        """This pass's gradients so far: float32 [adapters, size], B's not yet scaled."""
        return self._grads

    def has(self, adapter: Adapter) -> bool:
        return adapter.bank is self.bank and adapter.slot in self._index

    def gradient(self, adapter: Adapter) -> Tensor:
        """This pass's gradient so far, B's not yet scaled: float32 [size], a view."""
        return self._grads[self._index[adapter.slot]]

    def new_gradients(self) -> dict[int, Tensor]:
        """By slot, this pass's gradients of the adapters that had none. Once, at the end of the pass."""
        self._grads[:, self.bank.layout.b_start :].mul_(self._scales)  # the weights were scaled B
        # Adapters that step on another rank have their gradients there.
        self._index = {slot: i for slot, i in self._index.items() if self.bank.steps_here(slot)}
        new = {slot: i for slot, i in self._index.items() if slot not in self.bank.grads}
        if len(self._grads) == 1:
            return {slot: self._grads[0] for slot in new}
        # Each has its own memory, which is free as soon as this adapter has stepped, whatever the others do.
        return {slot: self._grads[i].clone() for slot, i in new.items()}

    def add(self, new: dict[int, Tensor]) -> None:
        """Add this pass's gradients to the adapters'; `new` is from `new_gradients`."""
        for slot, i in self._index.items():
            if slot in self.bank.grads:
                self.bank.grads[slot].add_(self._grads[i])
            else:
                self.bank.grads[slot] = new[slot]


def commit(scratches: Iterable[BankScratch]) -> None:
    """Add a pass's gradients to the adapters': to all or, if memory runs out, to none."""
    new = [(scratch, scratch.new_gradients()) for scratch in scratches]
    for scratch, gradients in new:
        scratch.add(gradients)


def _rows(members: list[int], device: torch.device) -> slice | Tensor:
    """An index of these rows; a slice gives a view, at no cost."""
    if consecutive(members):
        return slice(members[0], members[-1] + 1)
    return to_device(torch.tensor(members), device)
