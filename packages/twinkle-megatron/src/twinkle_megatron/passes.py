"""One pass over micro-batches through all stages: rows in, results and gradients out.

Each of the engine's micro-batches is cut into pieces, so that while one piece is in the last stage the next ones are in
earlier stages: Megatron-Core's schedule (1F1B: Narayanan et al. 2021, arXiv:2104.04473) runs over all pieces. Every
rank knows all rows and computes its own; the last stage's results go to all ranks.

Gradients are kept apart and added to the adapters' at the very end, on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from twinkle.server.backends.lora.banks import Adapter, Bank, Place
from twinkle.server.backends.lora.losses.row_losses import padded, row_losses, row_results
from twinkle.server.backends.lora.scratch import BankScratch, commit
from twinkle.server.backends.protocol import TARGETS, Row, RowResult
from twinkle_megatron import cpu
from twinkle_megatron.groups import Group, Groups
from twinkle_megatron.lora import ShardSegment
from twinkle_megatron.pieces import Piece, cut, tokens_at_once
from twinkle_megatron.recomputation import tokens_beside
from twinkle_megatron.shards import ShardedLayout, expert_places, layout_of, partial_places
from twinkle_megatron.stage import Stage


def run_pass(
    stage: Stage,
    adapters: dict[str, Adapter],
    micro_batches: Sequence[Sequence[Row]],
) -> list[list[RowResult]]:
    """Results by micro-batch and row; gradients are in the banks if, and only if, all micro-batches are done."""
    active = {row.adapter_id: adapters[row.adapter_id] for rows in micro_batches for row in rows}
    banks = list(dict.fromkeys(adapter.bank for adapter in active.values()))
    places = {name: (banks.index(adapter.bank), adapter.slot) for name, adapter in active.items()}
    trains = any(not row.forward_only for rows in micro_batches for row in rows)
    scratches = {
        bank: BankScratch(bank, [adapter for adapter in active.values() if adapter.bank is bank], trains)
        for bank in banks
    }
    found = _Found([[None] * len(rows) for rows in micro_batches])
    try:
        # Two schedules, since Megatron-Core runs the backward pass of all pieces or of none.
        for forward_only in (True, False):
            batches = [
                (i, rows)
                for i, rows in enumerate(micro_batches)
                if rows and all(row.forward_only for row in rows) == forward_only
            ]
            pieces = cut(batches, lambda row: places[row.adapter_id], stage.groups)
            _run_schedule(stage, _Pieces(stage, active, scratches, pieces, forward_only, found))
    finally:
        stage.context.segments = []
    results = _exchange_results(found, stage)
    if trains:
        for bank in banks:
            _add_up(scratches[bank].grads, layout_of(bank), stage.groups)
        commit(scratches.values())
    return results


# ---------------------------------------------------------------- schedule


@dataclass(eq=False)
class _Found:
    """The last stage's outcome.

    Attributes:
        results: by micro-batch and row, only this rank's.
        error: what the computation of a loss raised; the schedule goes on, since other ranks count on it.
    """

    results: list[list[RowResult | None]]
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What a schedule runs over."""

    stage: Stage
    adapters: dict[str, Adapter]
    scratches: dict[Bank, BankScratch]
    pieces: list[Piece]
    forward_only: bool
    found: _Found

    def segments(self, piece: Piece) -> list[ShardSegment]:
        """The segments of a piece. An adapter with rows only on other ranks has one too: if experts are spread over
        ranks, these rows may come here.
        """
        by_bank: dict[Bank, tuple[list[int], list[int]]] = {}
        for row in piece.rows:
            adapter = self.adapters[row.adapter_id]
            by_bank.setdefault(adapter.bank, ([], []))[0].append(adapter.slot)
        for row in piece.own_rows:
            adapter = self.adapters[row.adapter_id]
            by_bank[adapter.bank][1].append(adapter.slot)
        segments: list[ShardSegment] = []
        for bank, (slots, own) in by_bank.items():
            a, b = self.scratches[bank].leaves(slots, needs_grad=not self.forward_only)
            number = {slot: i for i, slot in enumerate(sorted(set(slots)))}
            whose = torch.tensor([number[slot] for slot in own], dtype=torch.int64, device=bank.device)
            segments.append(ShardSegment(len(own), len(number), whose, a, b))
        return segments


def _run_schedule(stage: Stage, work: _Pieces) -> None:
    if not work.pieces:
        return
    run = cast("Callable[..., object]", get_forward_backward_func())

    def forward(pieces: Iterator[Piece], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        return _forward(work, next(pieces), model)

    at_once = tokens_at_once(work.pieces, stage.groups)
    under_way = stage.groups.pipeline.size - stage.groups.pipeline.index
    affordable = tokens_beside(work.adapters.values(), stage, under_way)
    stage.context.recomputes = not work.forward_only and at_once > affordable
    with cpu.schedules_on(stage.groups.device), torch.set_grad_enabled(not work.forward_only):
        run(
            forward_step_func=forward,
            data_iterator=iter(work.pieces),
            model=[stage.model],
            num_microbatches=len(work.pieces),
            seq_length=0,  # each piece has its own: Megatron-Core exchanges their shapes
            micro_batch_size=0,
            forward_only=work.forward_only,
        )


def _forward(work: _Pieces, piece: Piece, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Run a piece through this stage; returns its output, and what to do with that of the last stage."""
    stage = work.stage
    device, length = stage.groups.device, piece.length(stage)
    stage.context.segments = work.segments(piece)
    tokens = torch.zeros(max(1, len(piece.own_rows)), length, dtype=torch.int64, device=device)
    targets = torch.zeros(*tokens.shape, 1, dtype=torch.int64, device=device)
    if piece.own_rows:
        own = padded([row.tokens for row in piece.own_rows], np.int64, device).squeeze(-1)
        tokens[:, : own.shape[1]] = own
        wanted = padded([row.loss_inputs[TARGETS] for row in piece.own_rows], np.int64, device)
        targets = targets.repeat(1, 1, wanted.shape[2])
        targets[:, : wanted.shape[1]] = wanted
    stage.context.targets = targets.transpose(0, 1)
    out = model(tokens, None, None)
    return out, lambda logprobs: _finish(work, piece, logprobs)


def _finish(work: _Pieces, piece: Piece, logprobs: Tensor) -> tuple[Tensor, Tensor, None]:
    """The loss of a piece; also stores its rows' results.

    Args:
        logprobs: float32 [rows, tokens, k].

    Returns:
        What Megatron-Core's schedules expect if losses are sums: the loss, a count that nothing is divided by, and
        nothing to collect.
    """
    loss = logprobs.new_zeros(())
    if piece.own_rows and work.found.error is None:
        try:
            losses = row_losses(piece.own_rows, logprobs)
            for (batch, place), result in zip(
                piece.own_places, row_results(piece.own_rows, logprobs, losses), strict=True
            ):
                work.found.results[batch][place] = result
            loss = losses.to_minimise(piece.own_rows)
        except Exception as error:
            work.found.error = error
    if not loss.requires_grad and not work.forward_only:
        loss = (logprobs * 0.0).sum()  # the other ranks' backward passes wait for this one's
    return loss, torch.ones((), dtype=torch.int, device=loss.device), None


# ---------------------------------------------------------------- between ranks


def _exchange_results(found: _Found, stage: Stage) -> list[list[RowResult]]:
    """All rows' results, on all ranks, or the error that one of them had.

    Raises:
        Exception: what a loss raised, on all ranks.
    """
    groups = stage.groups
    speaks = groups.is_last_stage and groups.tensor.index == 0
    told: list[_Found | None] = [found if speaks else None]
    if groups.world.size > 1:
        told = [None] * groups.world.size
        dist.all_gather_object(told, found if speaks else None, group=groups.control.ranks)
    speakers = [one for one in told if one is not None]
    for one in speakers:
        if one.error is not None:
            raise one.error
    merged: list[list[RowResult]] = []
    for i, results in enumerate(found.results):
        rows = [
            next(r for one in speakers if (r := one.results[i][j]) is not None) for j in range(len(results))
        ]
        merged.append(rows)
    return merged


def _add_up(grads: Tensor, layout: ShardedLayout, groups: Groups) -> None:
    """Sum the parts that several ranks have computed: from their own rows, or their own tokens of the same rows.

    Args:
        grads: float32 [adapters, size], changed in place.
    """
    _sum_places(grads, partial_places(layout), groups.tensor)
    if groups.data.size == 1 and groups.copies.size == 1:
        return
    experts = expert_places(layout)
    others = [place for place in (*layout.a.values(), *layout.b.values()) if place not in experts]
    _sum_places(grads, others, groups.data)
    _sum_places(grads, experts, groups.copies)


def _sum_places(grads: Tensor, places: list[Place], group: Group) -> None:
    if group.size == 1 or not places:
        return
    views = [grads[:, place.start : place.end] for place in places]
    together = torch.cat(views, dim=1)
    dist.all_reduce(together, group=group.ranks)
    totals = cast("list[Tensor]", together.split([view.shape[1] for view in views], dim=1))
    for view, total in zip(views, totals, strict=True):
        view.copy_(total)
