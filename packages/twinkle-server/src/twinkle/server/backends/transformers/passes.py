"""One pass over micro-batches: rows to log-probabilities and losses, gradients into a scratch that is added to the
adapters' once everything is done, so that a failed pass has changed nothing.

Owns the arithmetic of a pass; the adapters, banks and the model are the backend's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch

from twinkle.server.backends.hf.device_memory import giving_memory_back
from twinkle.server.backends.hf.rope import by_kind
from twinkle.server.backends.hf.threads import Threads
from twinkle.server.backends.lora.banks import Adapter, Bank
from twinkle.server.backends.lora.linear import BankSegment
from twinkle.server.backends.lora.losses.row_losses import padded, row_losses, row_results
from twinkle.server.backends.lora.scratch import BankScratch
from twinkle.server.backends.protocol import TARGETS, Row, RowResult
from twinkle.server.backends.shares import share_out
from twinkle.server.backends.transformers.network import LoraNetwork
from twinkle.server.backends.transformers.packed_rows import PackedRows
from twinkle.server.backends.transformers.pass_memory import PassLimits, Piece
from twinkle.server.backends.transformers.thread_parallel import ParallelNetworks


@dataclass(frozen=True, eq=False)
class Pass:
    """The outcome of micro-batches.

    Attributes:
        results: by micro-batch and row.
        scratches: the gradients, not yet added to the adapters'.
        trained: adapters with gradients among them.
    """

    results: list[list[RowResult]]
    scratches: list[BankScratch]
    trained: set[str]


def run_pass(
    networks: ParallelNetworks[LoraNetwork],
    threads: Threads,
    adapters: dict[str, Adapter],
    micro_batches: Sequence[Sequence[Row]],
    limits: PassLimits,
) -> Pass:
    """Compute all micro-batches, changing nothing of the adapters.

    The same micro-batches are always shared out alike, so that they give the same gradients, bit for bit, unless memory
    runs out: then all begins again in smaller pieces.

    Raises:
        TwinkleError: if memory has run out in the smallest.
    """
    packs = networks.first.packs
    tokens = sum(networks.first.tokens(rows) for rows in micro_batches)
    count = min(len(networks), threads.worth(tokens))
    shares = share_out(micro_batches, count, limits.overhead_tokens, packs)
    active = {row.adapter_id: adapters[row.adapter_id] for rows in micro_batches for row in rows}.values()

    def run_share(network: LoraNetwork, share: Sequence[Piece]) -> Computed:
        computed = Computed.begin(adapters, [piece.rows for piece in share])
        try:
            for piece in share:
                network.recomputation.is_on = piece.recomputes
                threads.fit(network.tokens(piece.rows), len(shares))
                computed.results.extend(_run_by_kind(network, adapters, computed.scratches, piece.rows))
        finally:
            network.route.segments = []
            network.recomputation.is_on = False
            threads.restore()
        return computed

    while True:
        pieces = [
            [piece for rows in share for piece in limits.cut(rows, adapters, active, len(shares))]
            for share in shares
        ]
        try:
            done = giving_memory_back(networks.first.device, partial(networks.run, run_share, pieces))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if not limits.tighten(chain.from_iterable(pieces)):
                raise limits.lack(micro_batches, adapters) from error
        else:
            limits.worked()
            return finish(micro_batches, done)


def finish(micro_batches: Sequence[Sequence[Row]], done: Sequence[Computed]) -> Pass:
    """Put together what was computed of the micro-batches' rows, in order."""
    results = chain.from_iterable(computed.results for computed in done)
    return Pass(
        results=[list(islice(results, len(rows))) for rows in micro_batches],
        scratches=[
            scratch for computed in done if computed.has_gradients for scratch in computed.scratches.values()
        ],
        trained={row.adapter_id for rows in micro_batches for row in rows if not row.forward_only},
    )


@dataclass(frozen=True, eq=False)
class Computed:
    """The outcome of a share of a pass: its rows' results in order, and gradients by bank."""

    scratches: dict[Bank, BankScratch]
    has_gradients: bool
    results: list[RowResult]

    @classmethod
    def begin(cls, adapters: dict[str, Adapter], share: Sequence[Sequence[Row]]) -> Computed:
        has_gradients = is_trained(chain.from_iterable(share))
        by_bank: dict[Bank, dict[int, Adapter]] = {}
        for row in chain.from_iterable(share):
            adapter = adapters[row.adapter_id]
            by_bank.setdefault(adapter.bank, {})[adapter.slot] = adapter
        scratches = {
            bank: BankScratch(bank, list(active.values()), has_gradients) for bank, active in by_bank.items()
        }
        return cls(scratches, has_gradients, [])


def is_trained(rows: Iterable[Row]) -> bool:
    """Whether any of the rows gives a gradient."""
    return any(not row.forward_only for row in rows)


def _run_by_kind(
    network: LoraNetwork,
    adapters: dict[str, Adapter],
    scratches: dict[Bank, BankScratch],
    rows: Sequence[Row],
) -> list[RowResult]:
    """Results of a micro-batch; its rows share a call only if each gets its own numbers there."""
    kinds = by_kind(network.boundaries, [len(row.tokens) for row in rows])
    found: dict[int, RowResult] = {}
    for kind in kinds:
        alike = [rows[i] for i in kind]
        results = run_micro_batch(network, adapters, scratches, alike, is_trained(alike))
        if isinstance(results, Exception):
            raise results
        found.update(zip(kind, results, strict=True))
    return [found[i] for i in range(len(rows))]


def run_micro_batch(
    network: LoraNetwork,
    adapters: dict[str, Adapter],
    scratches: dict[Bank, BankScratch],
    rows: Sequence[Row],
    goes_backward: bool,
) -> list[RowResult] | Exception:
    """Compute rows of one kind; their gradients are added to the scratches.

    Args:
        goes_backward: whether there is a backward pass, also if none of the rows needs it.

    Returns:
        Their results, or what a loss raised: then too the network has gone forward and backward.
    """
    place = {bank: i for i, bank in enumerate(scratches)}
    keys = [(place[adapters[row.adapter_id].bank], adapters[row.adapter_id].slot) for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    needs_grad, lengths = is_trained(rows), [len(row.tokens) for row in rows]
    packed_rows = None
    if network.packs and min(lengths) < max(lengths):
        packed_rows = PackedRows.of([lengths[k] for k in order], network.device)
    else:
        lengths = [max(lengths)] * len(rows)
    segments: list[BankSegment] = []
    for i, scratch in enumerate(scratches.values()):
        if own := [k for k in order if keys[k][0] == i]:
            slots = [keys[k][1] for k in own]
            segments.append(scratch.segment(slots, [lengths[k] for k in own], needs_grad, network.dtype))
    network.route.segments = segments
    results = _forward_backward(network, [rows[k] for k in order], packed_rows, goes_backward)
    if isinstance(results, Exception):
        return results
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _forward_backward(
    network: LoraNetwork, rows: list[Row], packed_rows: PackedRows | None, goes_backward: bool
) -> list[RowResult] | Exception:
    together = padded if packed_rows is None else packed_rows.concatenated
    tokens = together([row.tokens for row in rows], np.int64, network.device).squeeze(-1)
    targets = together([row.loss_inputs[TARGETS] for row in rows], np.int64, network.device)
    with torch.set_grad_enabled(goes_backward):
        logprobs = network.logprobs(tokens, targets, packed_rows)
    # The loss has a graph of its own, so that the model's is gone through even if the loss fails.
    own = logprobs.detach() if packed_rows is None else packed_rows.side_by_side(logprobs.detach())
    own.requires_grad_(goes_backward)
    found: list[RowResult] | Exception
    try:
        losses = row_losses(rows, own)
        if is_trained(rows):
            losses.to_minimise(rows).backward()
        found = row_results(rows, own, losses)
    except Exception as error:
        found = error
    if goes_backward:
        grad = torch.zeros_like(own) if own.grad is None else own.grad
        logprobs.backward(grad if packed_rows is None else packed_rows.packed(grad))
    return found
