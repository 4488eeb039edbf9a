"""One pass over micro-batches: rows to log-probabilities and losses, gradients into a scratch that is added to the
banks at the very end, so that a pass that fails has changed nothing.

Owns the arithmetic of a pass; the adapters, banks and the model are the backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from twinkle.server.backends.protocol import TARGETS, AdapterSpec, Row, RowResult
from twinkle.server.backends.transformers.banks import Bank, Place, consecutive
from twinkle.server.backends.transformers.logprobs import chunked_logprobs
from twinkle.server.backends.transformers.lora_linear import Route, Segment, spans_of
from twinkle.server.backends.transformers.rows import padded, row_losses, row_results


@dataclass(eq=False)
class Adapter:
    """A resident adapter: its shape and where it lives."""

    spec: AdapterSpec
    bank: Bank
    slot: int

    @property
    def scale(self) -> float:
        return self.spec.alpha / self.spec.rank


@dataclass(frozen=True, eq=False)
class Network:
    """A module tree with `LoraLinear` layers, cut in two.

    Attributes:
        body: token ids [rows, tokens] to hidden states.
        head: hidden states [rows, n, hidden] to logits [rows, n, vocab_size].
        route: what its layers look at.
    """

    body: nn.Module
    head: Callable[[Tensor], Tensor]
    vocab_size: int
    route: Route
    device: torch.device

    def logprobs(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """float32 [rows, n, k] of the `targets`, int64 [rows, n, k]; `tokens` is int64 [rows, n], padded at the right.

        Attention is causal, so that what stands to the right of a row's own tokens can't reach them: no mask is
        needed, and attention takes its fastest way.
        """
        hidden = cast("Tensor", cast("Any", self.body)(input_ids=tokens, use_cache=False).last_hidden_state)
        return chunked_logprobs(self.head, hidden, targets, self.vocab_size)


class BankScratch:
    """The adapters of one bank that take part in a pass, and their gradients of this pass, float32 [adapters, size]."""

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], keeps_gradients: bool) -> None:
        by_slot = {adapter.slot: adapter.scale for adapter in adapters}
        self._bank = bank
        self._slots = sorted(by_slot)
        self._index = {slot: i for i, slot in enumerate(self._slots)}
        device = bank.params.device
        self._slot_tensor = torch.tensor(self._slots, device=device)
        self._scales = torch.tensor([by_slot[slot] for slot in self._slots], device=device).unsqueeze(1)
        self._grads = torch.zeros(len(self._slots) if keeps_gradients else 0, bank.layout.size, device=device)

    def segment(self, slots: Sequence[int], needs_grad: bool) -> Segment:
        """The route of consecutive rows, whose adapters are in `slots`, in rising order.

        Gradients that flow into its matrices are added to the scratch.
        """
        members = sorted({self._index[slot] for slot in slots})
        number = {self._slots[member]: i for i, member in enumerate(members)}
        chosen = torch.tensor(members, device=self._slot_tensor.device)
        layout = self._bank.layout
        weights = self._bank.params.index_select(0, self._slot_tensor[chosen])
        weights[:, layout.b_start :].mul_(self._scales[chosen])
        a = {module: place.view(weights) for module, place in layout.a.items()}
        b = {module: place.view(weights) for module, place in layout.b.items()}
        if needs_grad:
            in_place = slice(members[0], members[-1] + 1) if consecutive(members) else None
            for leaves, places in ((a, layout.a), (b, layout.b)):
                for module, leaf in leaves.items():
                    self._collect(leaf, places[module], chosen, in_place)
        spans, span_adapters = spans_of([number[slot] for slot in slots])
        adapter_of_span = None if span_adapters is None else torch.tensor(span_adapters, device=chosen.device)
        return Segment(len(slots), spans, adapter_of_span, a, b)

    def _collect(self, leaf: Tensor, place: Place, chosen: Tensor, in_place: slice | None) -> None:
        """Have the gradient of `leaf` added to the scratch as soon as it is there, and let go of.

        Each matrix is a leaf of its own: as a slice of one leaf its gradient would come padded with zeros to the whole.
        """
        target = place.view(self._grads)

        def move(leaf: Tensor) -> None:
            assert leaf.grad is not None
            if in_place is not None:
                target[in_place].add_(leaf.grad)
            else:
                target.index_add_(0, chosen, leaf.grad)
            leaf.grad = None

        leaf.requires_grad_().register_post_accumulate_grad_hook(move)

    @property
    def grads(self) -> Tensor:
        """Of this pass, as they are so far: float32 [adapters, size], B's not yet scaled."""
        return self._grads

    def commit(self) -> None:
        """Add this pass's gradients to the adapters'."""
        self._grads[:, self._bank.layout.b_start :].mul_(self._scales)  # the leaves were scaled B
        if consecutive(self._slots):
            self._bank.grads[self._slots[0] : self._slots[-1] + 1].add_(self._grads)
        else:
            self._bank.grads.index_add_(0, self._slot_tensor, self._grads)


def run_pass(
    network: Network, adapters: dict[str, Adapter], micro_batches: Sequence[Sequence[Row]]
) -> list[list[RowResult]]:
    """Results by micro-batch and row; gradients are in the banks once, and only if, all micro-batches are done."""
    keeps_gradients = any(not row.forward_only for rows in micro_batches for row in rows)
    active = {row.adapter_id: adapters[row.adapter_id] for rows in micro_batches for row in rows}
    banks = list(dict.fromkeys(adapter.bank for adapter in active.values()))
    scratches = [
        BankScratch(bank, [adapter for adapter in active.values() if adapter.bank is bank], keeps_gradients)
        for bank in banks
    ]
    try:
        results = [_run_micro_batch(network, active, banks, scratches, rows) for rows in micro_batches]
    finally:
        network.route.segments = []
    if keeps_gradients:
        for scratch in scratches:
            scratch.commit()
    return results


def _run_micro_batch(
    network: Network,
    adapters: dict[str, Adapter],
    banks: list[Bank],
    scratches: list[BankScratch],
    rows: Sequence[Row],
) -> list[RowResult]:
    if not rows:
        return []
    place = {id(bank): i for i, bank in enumerate(banks)}
    keys = [(place[id(adapters[row.adapter_id].bank)], adapters[row.adapter_id].slot) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    needs_grad = any(not row.forward_only for row in rows)
    network.route.segments = [
        scratch.segment(slots, needs_grad)
        for i, scratch in enumerate(scratches)
        if (slots := [keys[k][1] for k in order if keys[k][0] == i])
    ]
    results = _forward_backward(network, [rows[k] for k in order], needs_grad)
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _forward_backward(network: Network, rows: list[Row], needs_grad: bool) -> list[RowResult]:
    tokens = padded([row.tokens for row in rows], np.int64, network.device).squeeze(-1)
    targets = padded([row.loss_inputs[TARGETS] for row in rows], np.int64, network.device)
    with torch.set_grad_enabled(needs_grad):
        logprobs = network.logprobs(tokens, targets)
        losses = row_losses(rows, logprobs)
        if needs_grad:
            kept = [loss.value for row, loss in zip(rows, losses, strict=True) if not row.forward_only]
            torch.stack(kept).sum().backward()
    return row_results(rows, logprobs, losses)
