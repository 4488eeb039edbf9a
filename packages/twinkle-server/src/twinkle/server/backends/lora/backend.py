"""What training backends with adapters in banks have in common: everything but the model and its passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams, Float32Array
from twinkle.server.backends.lora.adamw import PlannedSteps, plan_steps
from twinkle.server.backends.lora.adapter_state import check_fits
from twinkle.server.backends.lora.banks import Adapter, Bank, Layout
from twinkle.server.backends.lora.losses.formulas import LOSS_SPECS, check_row
from twinkle.server.backends.lora.module_groups import wanted_groups
from twinkle.server.backends.lora.replicas import Replicas
from twinkle.server.backends.protocol import (
    CUSTOM_LOSS,
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpec,
    LossSpecs,
    ModuleGroup,
    OptimizerState,
    Row,
    StepOutcome,
)


class LoraBackend(ABC):
    """Adapters and their banks, optimizer steps and state. A subclass adds `forward_backward` and `_layout`.

    An unknown adapter id is a `KeyError`, an existing one a `ValueError`: both are errors in the caller's code.
    """

    def __init__(self, info: BaseModelInfo, device: torch.device, replicas: Replicas | None = None) -> None:
        """
        Args:
            device: of the banks.
            replicas: the data-parallel ranks, if there are several.
        """
        self._info = info
        self._device = device
        self._replicas = replicas
        self._adapters: dict[str, Adapter] = {}
        self._banks: dict[tuple[int, frozenset[ModuleGroup]], Bank] = {}

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def loss_fns(self) -> LossSpecs:
        return {**LOSS_SPECS, CUSTOM_LOSS: LossSpec((), max_rank=2)}

    @abstractmethod
    def _layout(self, rank: int, groups: frozenset[ModuleGroup]) -> Layout:
        """The layout of adapters of this rank on the model's layers of these groups; may be empty."""

    # ------------------------------------------------------------ adapters

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        """Make an adapter like PEFT's: A uniform (Kaiming, a = sqrt 5) from `spec.seed`, B zero, no moments.

        Raises:
            InvalidRequest: if the rank is out of bounds, or the flags leave nothing to train.
        """
        if adapter_id in self._adapters:
            raise ValueError(f"there is an adapter {adapter_id!r} already")
        if not 1 <= spec.rank <= self._info.max_lora_rank:
            raise InvalidRequest(f"rank: {spec.rank} is not between 1 and {self._info.max_lora_rank}")
        bank = self._bank(spec)
        row = bank.layout.initial_row(spec.seed)
        replicas = self._replicas
        owner = 0 if replicas is None else replicas.choose_owner(bank.layout.size)
        slot = bank.take(steps_here=replicas is None or owner == replicas.index)
        bank.params[slot].copy_(row)
        self._adapters[adapter_id] = Adapter(spec, bank, slot, owner)

    def owner_of(self, adapter_id: str) -> int:
        """The data-parallel rank that has the adapter's gradient and moments."""
        return self._adapters[adapter_id].owner

    def remove_adapter(self, adapter_id: str) -> None:
        adapter = self._adapters.pop(adapter_id)
        adapter.bank.free(adapter.slot)
        if self._replicas is not None:
            self._replicas.release(adapter.owner, adapter.bank.layout.size)
        if adapter.bank.is_empty:
            del self._banks[adapter.spec.rank, wanted_groups(adapter.spec)]

    def _bank(self, spec: AdapterSpec) -> Bank:
        key = spec.rank, wanted_groups(spec)
        if key not in self._banks:
            layout = self._layout(*key)
            if not layout.modules:
                raise InvalidRequest(
                    "train_attn, train_mlp, train_unembed: no linear layer is left to train; set one"
                )
            self._banks[key] = Bank(layout, self._device)
        return self._banks[key]

    def _check_rows(self, micro_batches: Sequence[Sequence[Row]]) -> None:
        for rows in micro_batches:
            for row in rows:
                if row.adapter_id not in self._adapters:
                    raise KeyError(f"there is no adapter {row.adapter_id!r}")
                check_row(row, self._info.vocab_size)

    # ------------------------------------------------------------ optimizer

    def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        """Apply the steps, each to its own adapter, and zero those adapters' gradients.

        If it raises, nothing has changed. A step with a non-finite result is refused alone.
        """
        if len({step.adapter_id for step in steps}) < len(steps):
            raise ValueError("an adapter can take one step a call")
        if self._replicas is not None:
            return self._step_by_owners(steps, self._replicas)
        stepped = [self._adapters[step.adapter_id] for step in steps]
        planned = self._plan(_by_bank(stepped, steps))
        for plan in planned.values():
            plan.apply()
        return [planned[adapter.bank].outcome(adapter.slot) for adapter in stepped]

    def _step_by_owners(self, steps: Sequence[AdamStep], replicas: Replicas) -> list[StepOutcome]:
        stepped = [self._adapters[step.adapter_id] for step in steps]
        own = [i for i, adapter in enumerate(stepped) if adapter.owner == replicas.index]
        planned: dict[Bank, PlannedSteps] = {}
        told: dict[int, StepOutcome] | Exception
        try:
            planned = self._plan(_by_bank([stepped[i] for i in own], [steps[i] for i in own]))
            told = {i: planned[stepped[i].bank].outcome(stepped[i].slot) for i in own}
        except Exception as error:
            told = error
        outcomes = {i: outcome for of_rank in replicas.gather(told) for i, outcome in of_rank.items()}
        for plan in planned.values():
            plan.apply()
        made = [adapter for i, adapter in enumerate(stepped) if not isinstance(outcomes[i], InvalidRequest)]
        for adapter in made:
            if adapter.owner != replicas.index:
                adapter.bank.steps[adapter.slot] += 1
        replicas.share_weights(made)
        return [outcomes[i] for i in range(len(steps))]

    def _plan(self, by_bank: Mapping[Bank, dict[int, AdamParams]]) -> dict[Bank, PlannedSteps]:
        """Prepare the steps, given by bank and slot: whatever can fail fails here."""
        return {bank: plan_steps(bank, params) for bank, params in by_bank.items()}

    # ------------------------------------------------------------ state

    def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        """A copy of the adapter, on the host."""
        adapter = self._adapters[adapter_id]
        bank, slot = adapter.bank, adapter.slot
        moments = self._at_first_rank(adapter, [bank.exp_avg, bank.exp_avg_sq] if with_optimizer else [])
        gradient = self._at_first_rank(adapter, [bank.grads] if with_gradients else [])
        optimizer = None
        if moments:
            exp_avg, exp_avg_sq = (_host_copy(bank, row) for row in moments)
            optimizer = OptimizerState(step=bank.steps[slot], exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return AdapterState(
            spec=adapter.spec,
            target_modules=bank.layout.modules,
            weights=_host_copy(bank, bank.params[slot]),
            optimizer=optimizer,
            gradients=_host_copy(bank, gradient[0]) if gradient else None,
        )

    def _at_first_rank(self, adapter: Adapter, rows: Sequence[Mapping[int, Tensor]]) -> list[Tensor]:
        """The adapter's rows, float32 [size], zeros where missing; of data-parallel ranks, rank 0 gets them."""
        size, device = adapter.bank.layout.size, self._device
        found = [
            own[adapter.slot] if adapter.slot in own else torch.zeros(size, device=device) for own in rows
        ]
        if self._replicas is None:
            return found
        self._replicas.send_to_first(adapter.owner, found)
        return found if self._replicas.index == 0 else []

    def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        """Set an existing adapter of the same shape to `state`; anything missing there (moments, gradient) is reset.

        The adapter takes the state's alpha, so that it computes what the saved one did.

        Raises:
            InvalidRequest: if rank, target modules, names or shapes differ; then nothing has changed.
        """
        adapter = self._adapters[adapter_id]
        bank, slot, layout = adapter.bank, adapter.slot, adapter.bank.layout
        check_fits(state, adapter.spec, layout.modules, layout.shapes())
        bank.wipe(slot)
        bank.params[slot].copy_(layout.join(state.weights))
        if state.optimizer is not None:
            bank.steps[slot] = state.optimizer.step
        if bank.steps_here(slot):
            if state.optimizer is not None:
                bank.exp_avg[slot].copy_(layout.join(state.optimizer.exp_avg))
                bank.exp_avg_sq[slot].copy_(layout.join(state.optimizer.exp_avg_sq))
            if state.gradients is not None:
                bank.grads[slot] = layout.join(state.gradients).to(bank.device)
        adapter.spec = replace(adapter.spec, alpha=state.spec.alpha)

    def close(self) -> None:
        """Forget all adapters."""
        self._adapters.clear()
        self._banks.clear()


def _by_bank(stepped: Sequence[Adapter], steps: Sequence[AdamStep]) -> dict[Bank, dict[int, AdamParams]]:
    by_bank: dict[Bank, dict[int, AdamParams]] = {}
    for adapter, step in zip(stepped, steps, strict=True):
        by_bank.setdefault(adapter.bank, {})[adapter.slot] = step.params
    return by_bank


def _host_copy(bank: Bank, row: Tensor) -> dict[str, Float32Array]:
    return bank.layout.split(row.detach().to("cpu", copy=True))
