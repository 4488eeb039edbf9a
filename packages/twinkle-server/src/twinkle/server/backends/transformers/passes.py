"""One pass over micro-batches: rows to log-probabilities and losses, gradients into a scratch that is added to the
banks at the very end, so that a pass that fails has changed nothing.

Owns the arithmetic of a pass; the adapters, banks and the model are the backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from twinkle.server.backends.hf.rope import by_kind
from twinkle.server.backends.hf.threads import Threads
from twinkle.server.backends.lora.banks import Bank, consecutive
from twinkle.server.backends.lora.linear import Gradients, Route, Segment, spans_of
from twinkle.server.backends.lora.losses.logprobs import chunked_logprobs
from twinkle.server.backends.lora.losses.row_losses import padded, row_losses, row_results
from twinkle.server.backends.protocol import TARGETS, AdapterSpec, Row, RowResult
from twinkle.server.backends.transformers.activations import Recomputation
from twinkle.server.backends.transformers.thread_parallel import Lanes, padded_tokens, share_out


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
        recomputation: whether they keep their activations.
        boundaries: lengths on whose two sides rows must not share a call: see `rope`.
    """

    body: nn.Module
    head: Callable[[Tensor], Tensor]
    vocab_size: int
    route: Route
    recomputation: Recomputation
    device: torch.device
    boundaries: tuple[int, ...] = ()

    def hidden(self, tokens: Tensor) -> Tensor:
        """[rows, n, hidden] of `tokens`, int64 [rows, n]."""
        return cast("Tensor", cast("Any", self.body)(input_ids=tokens, use_cache=False).last_hidden_state)

    def logprobs(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """float32 [rows, n, k] of the `targets`, int64 [rows, n, k]; `tokens` is int64 [rows, n], padded at the right.

        Attention is causal, so that what stands to the right of a row's own tokens can't reach them: no mask is
        needed, and attention takes its fastest way.
        """
        return chunked_logprobs(self.head, self.hidden(tokens), targets, self.vocab_size)


@dataclass(frozen=True)
class PassLimits:
    """
    Attributes:
        affordable_tokens: of a micro-batch with more (rows x longest row) activations are computed again; those that
            are computed at the same time share it.
        overhead_tokens: what a micro-batch costs beside its tokens.
    """

    affordable_tokens: int
    overhead_tokens: int


class BankScratch:
    """The adapters of one bank that take part in a pass, and their gradients of this pass, float32 [adapters, size]."""

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], keeps_gradients: bool) -> None:
        by_slot = {adapter.slot: adapter.scale for adapter in adapters}
        self._bank = bank
        self._slots = sorted(by_slot)
        self._index = {slot: i for i, slot in enumerate(self._slots)}
        self._scales = torch.tensor([by_slot[slot] for slot in self._slots], device=bank.device).unsqueeze(1)
        count = len(self._slots) if keeps_gradients else 0
        self._grads = torch.zeros(count, bank.layout.size, device=bank.device)
        self._grads_a, self._grads_b = bank.layout.matrices(self._grads)

    def segment(self, slots: Sequence[int], needs_grad: bool) -> Segment:
        """The route of consecutive rows, whose adapters are in `slots`, in rising order.

        Gradients that flow into its matrices are added to the scratch.
        """
        members, a, b = self._weights(slots)
        number = {member: i for i, member in enumerate(members)}
        spans, span_adapters = spans_of([number[self._index[slot]] for slot in slots])
        device = self._grads.device
        adapter_of_span = None if span_adapters is None else torch.tensor(span_adapters, device=device)
        gradients = None
        if needs_grad:
            of_span = members if span_adapters is None else [members[i] for i in span_adapters]
            gradients = Gradients(self._grads_a, self._grads_b, _rows(of_span, device))
            of_experts = {
                module for module, place in self._bank.layout.a.items() if place.experts is not None
            }
            self._collect(members, a, b, of_experts)
        return Segment(len(slots), spans, adapter_of_span, a, b, gradients)

    def leaves(self, slots: Sequence[int], needs_grad: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The matrices A and (scaled) B of the adapters in `slots`, by layer, for whom autograd is to find gradients.

        They are leaves of the graph, and stacked in the order of their slots; their gradients are added to the scratch.
        """
        members, a, b = self._weights(slots)
        if needs_grad:
            self._collect(members, a, b, a)
        return a, b

    def _weights(self, slots: Sequence[int]) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
        """Which of the scratch's adapters are in `slots`, rising, and copies of their matrices, B's scaled."""
        members = sorted({self._index[slot] for slot in slots})
        weights = torch.stack([self._bank.params[self._slots[member]] for member in members])
        scales = self._scales if len(members) == len(self._slots) else self._scales[members]
        weights[:, self._bank.layout.b_start :].mul_(scales)
        return members, *self._bank.layout.matrices(weights)

    def _collect(
        self, members: list[int], a: dict[str, Tensor], b: dict[str, Tensor], modules: Iterable[str]
    ) -> None:
        """Have the gradients of leaves added to the scratch as soon as they are there, and let go of.

        Each matrix is a leaf of its own: as a slice of one leaf its gradient would come padded with zeros to the whole.
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
        """Of this pass, as they are so far: float32 [adapters, size], B's not yet scaled."""
        return self._grads

    def new_gradients(self) -> dict[int, Tensor]:
        """By slot, this pass's gradients of those adapters that had none. Once, at the end of the pass."""
        self._grads[:, self._bank.layout.b_start :].mul_(self._scales)  # the weights were scaled B
        new = {slot: i for slot, i in self._index.items() if slot not in self._bank.grads}
        if len(self._index) == 1:
            return {slot: self._grads[0] for slot in new}
        # Each its own memory, so that it is free as soon as this adapter has stepped, whatever the others do.
        return {slot: self._grads[i].clone() for slot, i in new.items()}

    def add(self, new: dict[int, Tensor]) -> None:
        """Add this pass's gradients to the adapters'; `new` as `new_gradients` gave it."""
        for slot, i in self._index.items():
            if slot in self._bank.grads:
                self._bank.grads[slot].add_(self._grads[i])
            else:
                self._bank.grads[slot] = new[slot]


def commit(scratches: Iterable[BankScratch]) -> None:
    """Add a pass's gradients to the adapters', to all or, where memory runs out, to none."""
    new = [(scratch, scratch.new_gradients()) for scratch in scratches]
    for scratch, gradients in new:
        scratch.add(gradients)


def _rows(members: list[int], device: torch.device) -> slice | Tensor:
    """An index of these rows; a slice is a view, and costs nothing."""
    if consecutive(members):
        return slice(members[0], members[-1] + 1)
    return torch.tensor(members, device=device)


def run_pass(
    lanes: Lanes[Network],
    threads: Threads,
    adapters: dict[str, Adapter],
    micro_batches: Sequence[Sequence[Row]],
    limits: PassLimits,
) -> list[list[RowResult]]:
    """Results by micro-batch and row; gradients are in the banks once, and only if, all micro-batches are done.

    The same micro-batches are shared out alike each time, so that the same gradients come of them, to the bit.
    """
    tokens = sum(padded_tokens(rows) for rows in micro_batches)
    shares = share_out(micro_batches, min(len(lanes), threads.worth(tokens)), limits.overhead_tokens)
    affordable = limits.affordable_tokens // len(shares)

    def run_share(network: Network, share: Sequence[Sequence[Row]]) -> _Computed:
        computed = _Computed.begin(adapters, share)
        try:
            for rows in share:
                size = padded_tokens(rows)
                network.recomputation.is_on = size > affordable
                threads.fit(size, len(shares))
                computed.results.extend(_run_by_kind(network, adapters, computed.scratches, rows))
        finally:
            network.route.segments = []
            network.recomputation.is_on = False
            threads.restore()
        return computed

    done = lanes.run(run_share, shares)
    commit(scratch for computed in done if computed.has_gradients for scratch in computed.scratches.values())
    results = chain.from_iterable(computed.results for computed in done)
    return [list(islice(results, len(rows))) for rows in micro_batches]


@dataclass(frozen=True, eq=False)
class _Computed:
    """What comes of a share of a pass: its rows' results in order, and gradients by bank."""

    scratches: dict[Bank, BankScratch]
    has_gradients: bool
    results: list[RowResult]

    @classmethod
    def begin(cls, adapters: dict[str, Adapter], share: Sequence[Sequence[Row]]) -> _Computed:
        has_gradients = any(not row.forward_only for row in chain.from_iterable(share))
        by_bank: dict[Bank, dict[int, Adapter]] = {}
        for row in chain.from_iterable(share):
            adapter = adapters[row.adapter_id]
            by_bank.setdefault(adapter.bank, {})[adapter.slot] = adapter
        scratches = {
            bank: BankScratch(bank, list(active.values()), has_gradients) for bank, active in by_bank.items()
        }
        return cls(scratches, has_gradients, [])


def _run_by_kind(
    network: Network, adapters: dict[str, Adapter], scratches: dict[Bank, BankScratch], rows: Sequence[Row]
) -> list[RowResult]:
    """Results of a micro-batch, whose rows share a call as far as each gets its own numbers there."""
    kinds = by_kind(network.boundaries, [len(row.tokens) for row in rows])
    found: dict[int, RowResult] = {}
    for kind in kinds:
        results = _run_micro_batch(network, adapters, scratches, [rows[i] for i in kind])
        found.update(zip(kind, results, strict=True))
    return [found[i] for i in range(len(rows))]


def _run_micro_batch(
    network: Network, adapters: dict[str, Adapter], scratches: dict[Bank, BankScratch], rows: Sequence[Row]
) -> list[RowResult]:
    place = {bank: i for i, bank in enumerate(scratches)}
    keys = [(place[adapters[row.adapter_id].bank], adapters[row.adapter_id].slot) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    needs_grad = any(not row.forward_only for row in rows)
    network.route.segments = [
        scratch.segment(slots, needs_grad)
        for i, scratch in enumerate(scratches.values())
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
            losses.to_minimise(rows).backward()
    return row_results(rows, logprobs, losses)
