"""Training on Megatron-Core: one frozen base spread over ranks, adapters in stacked banks; each rank keeps a part.

    stage         this rank's part of the model: architecture, build, weights, and the LoRA layers in it
    shards        which part of an adapter is this rank's
    passes        micro-batches to results and gradients: pieces, Megatron-Core's schedule
    lora, head, experts, delta_net, collectives      the arithmetic
    recomputation   whether a pass keeps its activations
    groups, cpu   the ranks, and Megatron-Core without a GPU

Every rank gets every call, in the same order, and checks it in the same way: all refuse, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.lora.adamw import PlannedSteps, is_sure_norm, plan_steps
from twinkle.server.backends.lora.backend import LoraBackend
from twinkle.server.backends.lora.banks import Bank
from twinkle.server.backends.lora.finite import Fault
from twinkle.server.backends.lora.module_groups import ModuleGroup
from twinkle.server.backends.protocol import ModelConfig, Row, RowResult
from twinkle_megatron import stage
from twinkle_megatron.passes import run_pass
from twinkle_megatron.shards import ShardedLayout, layout_of, sharded_layout
from twinkle_megatron.stage import Stage


class MegatronBackend(LoraBackend):
    """See `twinkle.server.backends.protocol.TrainingBackend`; one of the ranks that form a backend.

    Any error but `InvalidRequest`, `KeyError` and `ValueError` may have left the ranks out of step: they must be
    restarted.
    """

    def __init__(self, config: ModelConfig, loaded: Stage | None = None) -> None:
        """
        Args:
            loaded: this rank's part of the model; default: read it from `config.path`.

        Raises:
            InvalidRequest: if the model can't be loaded as configured.
        """
        self._stage = loaded if loaded is not None else stage.load(config)
        super().__init__(
            replace(self._stage.info, max_lora_rank=config.max_lora_rank), self._stage.groups.device
        )

    def _layout(self, rank: int, groups: frozenset[ModuleGroup]) -> ShardedLayout:
        targets = [target for target in self._stage.targets if target.group in groups]
        return sharded_layout(targets, rank, self._stage.architecture, self._stage.groups)

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        """See `TrainingBackend`.

        Raises:
            InvalidRequest: if a row's loss, inputs or tokens are not possible.
        """
        self._check_rows(micro_batches)
        if not any(micro_batches):
            return [[] for _ in micro_batches]
        return run_pass(self._stage, self._adapters, micro_batches)

    def _plan(self, by_bank: Mapping[Bank, dict[int, AdamParams]]) -> dict[Bank, PlannedSteps]:
        norms = self._grad_norms(by_bank)
        planned = {bank: plan_steps(bank, params, norms[bank]) for bank, params in by_bank.items()}
        # Norms are of whole gradients, so that all ranks find the same steps suspicious, and all ask or none.
        if any(plan.is_suspicious for plan in planned.values()):
            return self._agreed(planned)
        return planned

    def _agreed(self, planned: Mapping[Bank, PlannedSteps]) -> dict[Bank, PlannedSteps]:
        """The steps that no rank finds a fault in: each has checked its part of the adapters."""
        slots = [(bank, slot) for bank, plan in planned.items() for slot in plan.params]
        codes = [int(planned[bank].faults.get(slot, Fault.NONE)) for bank, slot in slots]
        worst = torch.tensor(codes, dtype=torch.int64, device=self._stage.groups.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._stage.groups.world.ranks)
        faults: dict[Bank, dict[int, Fault]] = {bank: {} for bank in planned}
        for (bank, slot), code in zip(slots, cast("list[int]", worst.tolist()), strict=True):
            if code != Fault.NONE:
                faults[bank][slot] = Fault(code)
        return {bank: replace(plan, faults=faults[bank]) for bank, plan in planned.items()}

    def _grad_norms(self, by_bank: Mapping[Bank, Mapping[int, AdamParams]]) -> dict[Bank, dict[int, float]]:
        """By bank and slot, norms of whole gradients: one sum over all ranks, for all adapters."""
        slots = [(bank, slot) for bank, params in by_bank.items() for slot in params]
        if not slots:
            return {}
        found = dict(zip(slots, self._norms(slots, torch.float32), strict=True))
        # All ranks have the same sums, and so recompute the same ones.
        if doubtful := [place for place, norm in found.items() if not is_sure_norm(norm)]:
            found |= zip(doubtful, self._norms(doubtful, torch.float64), strict=True)
        norms: dict[Bank, dict[int, float]] = {bank: {} for bank in by_bank}
        for (bank, slot), norm in found.items():
            norms[bank][slot] = norm
        return norms

    def _norms(self, slots: Sequence[tuple[Bank, int]], dtype: torch.dtype) -> list[float]:
        squares = torch.stack(
            [
                bank.gradient(slot).to(dtype).square() @ layout_of(bank).shares.to(dtype)
                for bank, slot in slots
            ]
        )
        dist.all_reduce(squares, group=self._stage.groups.world.ranks)
        return cast("list[float]", squares.sqrt().tolist())
