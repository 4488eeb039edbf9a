"""Training on Megatron-Core: one frozen base spread over ranks, adapters in stacked banks; each rank keeps a part.

    stage         this rank's part of the model: architecture, build, weights, and the LoRA layers in it
    shards        which part of an adapter is this rank's
    passes        micro-batches to results and gradients: pieces, Megatron-Core's schedule
    lora, head, experts, collectives      the arithmetic
    groups, cpu   the ranks, and Megatron-Core without a GPU

Every rank gets every call, in the same order, and checks it in the same way: what one refuses all refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams, Array
from twinkle.server.backends.lora.adamw import PlannedSteps, is_sure_norm, plan_steps
from twinkle.server.backends.lora.adapter_state import check_fits
from twinkle.server.backends.lora.banks import Adapter, Bank, Layout
from twinkle.server.backends.lora.finite import Fault
from twinkle.server.backends.lora.losses.formulas import LOSS_SPECS
from twinkle.server.backends.lora.module_groups import ModuleGroup, wanted_groups
from twinkle.server.backends.lora.row_checks import check_row
from twinkle.server.backends.protocol import (
    CUSTOM_LOSS,
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpec,
    LossSpecs,
    ModelConfig,
    OptimizerState,
    Row,
    RowResult,
    StepOutcome,
)
from twinkle_megatron import shards, stage
from twinkle_megatron.passes import run_pass
from twinkle_megatron.shards import Shard, Target
from twinkle_megatron.stage import Stage


class MegatronBackend:
    """See `twinkle.server.backends.protocol.TrainingBackend`; one of the ranks that are a backend together.

    An unknown adapter id is a `KeyError`, one that is taken a `ValueError`: both are mistakes of the caller's code.
    Any other error but `InvalidRequest` may have left the ranks at different places: then they are to be started anew.
    """

    def __init__(self, config: ModelConfig, loaded: Stage | None = None) -> None:
        """
        Args:
            loaded: this rank's part of the model, if it is there already; else it is read from `config.path`.

        Raises:
            InvalidRequest: if the model can't be loaded as `config` says.
        """
        self._stage = loaded if loaded is not None else stage.load(config)
        self._info = replace(self._stage.info, max_lora_rank=config.max_lora_rank)
        self._adapters: dict[str, Adapter] = {}
        self._banks: dict[tuple[int, frozenset[ModuleGroup]], Bank] = {}
        self._parts: dict[Bank, list[Shard]] = {}
        self._shares: dict[Bank, Tensor] = {}

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def loss_fns(self) -> LossSpecs:
        return {**LOSS_SPECS, CUSTOM_LOSS: LossSpec((), max_rank=2)}

    # ------------------------------------------------------------ adapters

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        """Make an adapter as PEFT would; a seed gives the one that it gives on the Transformers backend.

        Raises:
            InvalidRequest: if the rank is out of bounds, or the flags leave nothing to train.
        """
        if adapter_id in self._adapters:
            raise ValueError(f"there is an adapter {adapter_id!r} already")
        if not 1 <= spec.rank <= self._info.max_lora_rank:
            raise InvalidRequest(f"rank: {spec.rank} is not between 1 and {self._info.max_lora_rank}")
        bank = self._bank(spec)
        row = shards.initial_part(self._targets(spec), self._parts[bank], bank.layout, spec.seed)
        slot = bank.take()
        bank.params[slot].copy_(row)
        self._adapters[adapter_id] = Adapter(spec, bank, slot)

    def remove_adapter(self, adapter_id: str) -> None:
        adapter = self._adapters.pop(adapter_id)
        bank = adapter.bank
        bank.free(adapter.slot)
        if bank.is_empty:
            del self._banks[adapter.spec.rank, wanted_groups(adapter.spec)]
            del self._parts[bank], self._shares[bank]

    def _bank(self, spec: AdapterSpec) -> Bank:
        key = spec.rank, wanted_groups(spec)
        if key not in self._banks:
            targets = self._targets(spec)
            if not targets:
                raise InvalidRequest(
                    "train_attn, train_mlp, train_unembed: no linear layer is left to train; set one"
                )
            groups = self._stage.groups
            parts = shards.shards(targets, self._stage.architecture, groups)
            bank = Bank(Layout.of([shard.shape for shard in parts], spec.rank), groups.device)
            self._banks[key] = bank
            self._parts[bank] = parts
            self._shares[bank] = shards.shares(parts, bank.layout).to(groups.device)
        return self._banks[key]

    def _targets(self, spec: AdapterSpec) -> list[Target]:
        wanted = wanted_groups(spec)
        return [target for target in self._stage.targets if target.group in wanted]

    # ------------------------------------------------------------ training

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        """Run the micro-batches; add gradients of the rows' losses to their adapters'.

        All or nothing: if it raises, no adapter's gradient has changed.

        Raises:
            InvalidRequest: if a row's loss, inputs or tokens are not possible.
        """
        for rows in micro_batches:
            for row in rows:
                if row.adapter_id not in self._adapters:
                    raise KeyError(f"there is no adapter {row.adapter_id!r}")
                check_row(row, self._info.vocab_size)
        if not any(micro_batches):
            return [[] for _ in micro_batches]
        return run_pass(self._stage, self._adapters, self._parts, micro_batches)

    def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        """Apply the steps, each to its own adapter, and zero those adapters' gradients.

        If it raises, nothing has changed. A step that would leave numbers that are not finite is refused alone.
        """
        if len({step.adapter_id for step in steps}) < len(steps):
            raise ValueError("an adapter can take one step a call")
        stepped = [self._adapters[step.adapter_id] for step in steps]
        by_bank: dict[Bank, dict[int, AdamParams]] = {}
        for adapter, step in zip(stepped, steps, strict=True):
            by_bank.setdefault(adapter.bank, {})[adapter.slot] = step.params
        norms = self._grad_norms(by_bank)
        planned = {bank: plan_steps(bank, params, norms[bank]) for bank, params in by_bank.items()}
        if any(plan.is_suspicious for plan in planned.values()):
            planned = self._agreed(planned)
        for plan in planned.values():
            plan.apply()
        return [planned[adapter.bank].outcome(adapter.slot) for adapter in stepped]

    def _agreed(self, planned: Mapping[Bank, PlannedSteps]) -> dict[Bank, PlannedSteps]:
        """The steps that no rank finds a fault with: each has looked at its part of the adapters."""
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
        """By bank and slot, of the whole gradient: one sum over all ranks, for all adapters."""
        slots = [(bank, slot) for bank, params in by_bank.items() for slot in params]
        if not slots:
            return {}
        found = dict(zip(slots, self._norms(slots, torch.float32), strict=True))
        # All ranks have the same sums, and so doubt the same ones.
        if doubtful := [place for place, norm in found.items() if not is_sure_norm(norm)]:
            found |= zip(doubtful, self._norms(doubtful, torch.float64), strict=True)
        norms: dict[Bank, dict[int, float]] = {bank: {} for bank in by_bank}
        for (bank, slot), norm in found.items():
            norms[bank][slot] = norm
        return norms

    def _norms(self, slots: Sequence[tuple[Bank, int]], dtype: torch.dtype) -> list[float]:
        squares = torch.stack(
            [bank.gradient(slot).to(dtype).square() @ self._shares[bank].to(dtype) for bank, slot in slots]
        )
        dist.all_reduce(squares, group=self._stage.groups.world.ranks)
        return cast("list[float]", squares.sqrt().tolist())

    # ------------------------------------------------------------ state

    def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        """A copy of the adapter, on the host: whole on the first rank, without matrices on the others."""
        adapter = self._adapters[adapter_id]
        bank, slot = adapter.bank, adapter.slot
        optimizer = None
        if with_optimizer:
            exp_avg = self._whole(adapter, bank.exp_avg[slot])
            exp_avg_sq = self._whole(adapter, bank.exp_avg_sq[slot])
            optimizer = OptimizerState(step=bank.steps[slot], exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return AdapterState(
            spec=adapter.spec,
            target_modules=[target.shape.name for target in self._targets(adapter.spec)],
            weights=self._whole(adapter, bank.params[slot]),
            optimizer=optimizer,
            gradients=self._whole(adapter, bank.gradient(slot)) if with_gradients else None,
        )

    def _whole(self, adapter: Adapter, row: Tensor) -> dict[str, Array]:
        """A bank's row, of all ranks, as PEFT's matrices; empty on all but the first rank."""
        groups = self._stage.groups
        own = adapter.bank.layout.split(row.detach().to("cpu", copy=True))
        given = shards.pieces(own, self._parts[adapter.bank], groups)
        is_first = groups.world.index == 0
        gathered: list[list[shards.Piece]] = [[] for _ in range(groups.world.size)]
        dist.gather_object(given, gathered if is_first else None, group=groups.control.ranks)
        if not is_first:
            return {}
        pieces = [piece for pieces in gathered for piece in pieces]
        return shards.put_together(pieces, self._targets(adapter.spec))

    def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        """Set an existing adapter of the same shape to `state`; what `state` leaves out (moments, gradient) is reset.

        The adapter takes over the state's alpha, so that it computes what the saved one did.

        Raises:
            InvalidRequest: if rank, target modules, names or shapes differ; then nothing has changed.
        """
        adapter = self._adapters[adapter_id]
        bank, slot = adapter.bank, adapter.slot
        targets = self._targets(adapter.spec)
        whole = Layout.of([target.shape for target in targets], adapter.spec.rank)
        check_fits(state, adapter.spec, whole.modules, whole.shapes())
        bank.wipe(slot)
        self._set(bank.params[slot], bank, state.weights)
        if state.optimizer is not None:
            self._set(bank.exp_avg[slot], bank, state.optimizer.exp_avg)
            self._set(bank.exp_avg_sq[slot], bank, state.optimizer.exp_avg_sq)
            bank.steps[slot] = state.optimizer.step
        if state.gradients is not None:
            bank.grads[slot] = torch.empty_like(bank.params[slot])
            self._set(bank.grads[slot], bank, state.gradients)
        adapter.spec = replace(adapter.spec, alpha=state.spec.alpha)

    def _set(self, row: Tensor, bank: Bank, matrices: Mapping[str, Array]) -> None:
        row.copy_(bank.layout.join(shards.cut_matrices(matrices, self._parts[bank])))

    def close(self) -> None:
        """Forget all adapters. The base model goes with the process."""
        self._adapters.clear()
        self._banks.clear()
        self._parts.clear()
        self._shares.clear()
