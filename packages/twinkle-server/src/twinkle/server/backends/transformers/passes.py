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

from twinkle.protocol.types import Array
from twinkle.server.backends.loss_formulas import LOSS_SPECS
from twinkle.server.backends.protocol import TARGETS, AdapterSpec, CustomLoss, Row, RowResult
from twinkle.server.backends.transformers import custom_loss
from twinkle.server.backends.transformers.banks import Bank, Place, consecutive
from twinkle.server.backends.transformers.logprobs import chunked_logprobs
from twinkle.server.backends.transformers.lora_linear import Route, Segment, spans_of
from twinkle.server.backends.transformers.losses import LOSSES, Loss


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
    tokens = _padded([row.tokens for row in rows], np.int64, network.device).squeeze(-1)
    targets = _padded([row.loss_inputs[TARGETS] for row in rows], np.int64, network.device)
    with torch.set_grad_enabled(needs_grad):
        logprobs = network.logprobs(tokens, targets)
        losses = _losses(rows, logprobs)
        if needs_grad:
            kept = [loss.value for row, loss in zip(rows, losses, strict=True) if not row.forward_only]
            torch.stack(kept).sum().backward()
    host_logprobs = logprobs.detach().cpu()
    scalars = [scalar.detach() for loss in losses for scalar in (loss.value, *loss.metrics.values())]
    numbers = iter(cast("list[float]", torch.stack(scalars).tolist()))  # one transfer for all of them
    results: list[RowResult] = []
    for row, row_logprobs, loss in zip(rows, host_logprobs, losses, strict=True):
        value = next(numbers)
        metrics = {name: next(numbers) for name in loss.metrics}
        own = _cut(row_logprobs, row.loss_inputs[TARGETS].shape)
        results.append(RowResult(own.numpy().copy(), value, metrics))
    return results


def _losses(rows: list[Row], logprobs: Tensor) -> list[Loss]:
    """Each row's loss; `logprobs` is [rows, tokens, k]."""
    names = {name for row in rows if row.custom_loss is None for name in LOSS_SPECS[row.loss_fn].inputs}
    empty = np.zeros(0, np.float32)
    padded = {
        name: _padded([row.loss_inputs.get(name, empty) for row in rows], np.float32, logprobs.device)
        for name in sorted(names)
    }
    losses: list[Loss] = []
    for i, (row, row_logprobs) in enumerate(zip(rows, logprobs.unbind(0), strict=True)):
        shape = row.loss_inputs[TARGETS].shape
        own_logprobs = _cut(row_logprobs, shape)
        if row.custom_loss is not None:
            losses.append(_custom_loss(row, row.custom_loss, own_logprobs))
            continue
        spec = LOSS_SPECS[row.loss_fn]
        inputs = {name: _cut(padded[name][i], shape) for name in spec.inputs}
        losses.append(LOSSES[row.loss_fn](own_logprobs, inputs, {**spec.config, **row.loss_config}))
    return losses


def _custom_loss(row: Row, loss: CustomLoss, logprobs: Tensor) -> Loss:
    inputs: dict[str, Tensor] = {}
    for wanted in loss.inputs[1:]:
        array = row.loss_inputs[wanted.name]
        inputs[wanted.name] = torch.tensor(
            array.reshape(()) if wanted.rank == 0 else array, device=logprobs.device
        )
    return Loss(*custom_loss.run(loss, logprobs, inputs))


def _cut(padded: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A row's own part, [T] or [T, K], of [tokens, k]."""
    own = padded[: shape[0]]
    return own[:, 0] if len(shape) == 1 else own[:, : shape[1]]


def _padded(arrays: list[Array], dtype: type[np.float32] | type[np.int64], device: torch.device) -> Tensor:
    """[T_i] or [T_i, K_i] each to [rows, longest, widest], zeros at the right."""
    matrices = [array.reshape(len(array), -1) if array.size else array.reshape(0, 1) for array in arrays]
    shape = (len(arrays), max(len(m) for m in matrices), max(m.shape[1] for m in matrices))
    padded = np.zeros(shape, dtype)
    for row, matrix in zip(padded, matrices, strict=True):
        row[: len(matrix), : matrix.shape[1]] = matrix
    return torch.from_numpy(padded).to(device)
