"""Training on a Transformers model: one frozen base on one device, adapters in stacked banks.

    base_model    loads the model            lora_linear    a linear layer with many adapters' terms
    banks         where adapters live        expert_lora    routed experts with many adapters' terms
    logprobs, losses, adamw   arithmetic     passes         micro-batches to results and gradients
    activations   what a pass keeps, measured; computed again where it would be too much
    threads, lanes   how many threads compute a pass, and how it is shared out among them

Not here: routed experts that are not plain gated layers get no low-rank term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.hf.base_model import (
    LoadedModel,
    copy_sharing_weights,
    decoder,
    finish_logits,
    load_base_model,
)
from twinkle.server.backends.hf.model_facts import (
    affordable_adapter_bytes,
    affordable_tokens,
    bounded_batch_tokens,
)
from twinkle.server.backends.hf.rope import rope_boundaries
from twinkle.server.backends.hf.threads import Threads
from twinkle.server.backends.lora.adamw import plan_steps
from twinkle.server.backends.lora.adapter_state import check_fits
from twinkle.server.backends.lora.banks import Adapter, Bank, Layout, LinearShape, initial_row
from twinkle.server.backends.lora.experts import wrap_experts
from twinkle.server.backends.lora.linear import LoraLinear, Route
from twinkle.server.backends.lora.losses.formulas import LOSS_SPECS
from twinkle.server.backends.lora.module_groups import ModuleGroup, is_expert_parameter, wanted_groups
from twinkle.server.backends.lora.row_checks import check_row
from twinkle.server.backends.lora.scratch import BankScratch
from twinkle.server.backends.lora.wrapped_linear import wrap_linears
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
from twinkle.server.backends.transformers.activations import (
    Recomputation,
    recompute_layers,
    token_bytes,
)
from twinkle.server.backends.transformers.passes import Network, PassLimits, run_pass
from twinkle.server.backends.transformers.thread_parallel import MOST_LANES, Lanes


class TransformersBackend:
    """See `twinkle.server.backends.protocol.TrainingBackend`.

    An unknown adapter id is a `KeyError`, one that is taken a `ValueError`: both are mistakes of the caller's code.
    """

    def __init__(self, config: ModelConfig, loaded: LoadedModel | None = None) -> None:
        """
        Args:
            loaded: a model that is there already, to share its weights; else it is loaded from `config.path`.

        Raises:
            InvalidRequest: if the model can't be loaded as `config` says.
        """
        self._loaded = loaded if loaded is not None else load_base_model(config)
        self._threads = Threads(self._loaded.model)
        most = min(self._threads.most, MOST_LANES)
        self._lanes = Lanes([_network(self._loaded) for _ in range(most)])
        self._adapters: dict[str, Adapter] = {}
        self._banks: dict[tuple[int, frozenset[ModuleGroup]], Bank] = {}
        device = self._loaded.device
        affordable = affordable_tokens(_token_bytes(self._loaded, self._lanes.first), device)
        self._limits = PassLimits(affordable, self._loaded.info.overhead_tokens)
        self._info = replace(
            self._loaded.info,
            max_lora_rank=config.max_lora_rank,
            max_batch_tokens=bounded_batch_tokens(affordable, device),
            max_adapter_bytes=affordable_adapter_bytes(device),
        )

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: ModelConfig) -> TransformersBackend:
        """A backend on a model that something else in this process uses too; the weights are shared."""
        return cls(config, loaded)

    @property
    def loaded(self) -> LoadedModel:
        """The base model, without adapters: for whatever is to share its weights."""
        return self._loaded

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def loss_fns(self) -> LossSpecs:
        return {**LOSS_SPECS, CUSTOM_LOSS: LossSpec((), max_rank=2)}

    # ------------------------------------------------------------ adapters

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        """Make an adapter as PEFT would: A uniform (Kaiming, a = sqrt 5) from `spec.seed`, B zero, no moments.

        Raises:
            InvalidRequest: if the rank is out of bounds, or the flags leave nothing to train.
        """
        if adapter_id in self._adapters:
            raise ValueError(f"there is an adapter {adapter_id!r} already")
        if not 1 <= spec.rank <= self._info.max_lora_rank:
            raise InvalidRequest(f"rank: {spec.rank} is not between 1 and {self._info.max_lora_rank}")
        bank = self._bank(spec)
        row = initial_row(bank.layout, spec.seed)
        slot = bank.take()
        bank.params[slot].copy_(row)
        self._adapters[adapter_id] = Adapter(spec, bank, slot)

    def remove_adapter(self, adapter_id: str) -> None:
        adapter = self._adapters.pop(adapter_id)
        adapter.bank.free(adapter.slot)
        if adapter.bank.is_empty:
            del self._banks[adapter.spec.rank, wanted_groups(adapter.spec)]

    def _bank(self, spec: AdapterSpec) -> Bank:
        groups = wanted_groups(spec)
        key = spec.rank, groups
        if key not in self._banks:
            model = self._loaded.model
            layers = [_shape(name, model) for name, group in self._loaded.targets.items() if group in groups]
            if not layers:
                raise InvalidRequest(
                    "train_attn, train_mlp, train_unembed: no linear layer is left to train; set one"
                )
            self._banks[key] = Bank(Layout.of(layers, spec.rank), self._loaded.device)
        return self._banks[key]

    # ------------------------------------------------------------ training

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        """Run the micro-batches; add gradients of the rows' losses to their adapters'.

        All or nothing: if it raises, no adapter's gradient has changed.

        Raises:
            InvalidRequest: if a row's loss, inputs or tokens are not possible.
            torch.OutOfMemoryError, MemoryError: the pass's memory has been given back; another pass can be run.
        """
        for rows in micro_batches:
            for row in rows:
                if row.adapter_id not in self._adapters:
                    raise KeyError(f"there is no adapter {row.adapter_id!r}")
                check_row(row, self._info.vocab_size)
        try:
            return run_pass(self._lanes, self._threads, self._adapters, micro_batches, self._limits)
        except torch.OutOfMemoryError as error:
            out_of_memory: Exception = error.with_traceback(None)  # it holds the frames that hold the tensors
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # the only sign that the CPU's allocator gives
                raise
            out_of_memory = MemoryError(str(error))
        self._release_memory()
        raise out_of_memory

    def _release_memory(self) -> None:
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        """Apply the steps, each to its own adapter, and zero those adapters' gradients.

        If it raises, nothing has changed. A step that would leave numbers that are not finite is refused alone.
        """
        if len({step.adapter_id for step in steps}) < len(steps):
            raise ValueError("an adapter can take one step a call")
        by_bank: dict[Bank, dict[int, AdamParams]] = {}
        for step in steps:
            adapter = self._adapters[step.adapter_id]
            by_bank.setdefault(adapter.bank, {})[adapter.slot] = step.params
        planned = {bank: plan_steps(bank, params) for bank, params in by_bank.items()}
        for plan in planned.values():
            plan.apply()
        stepped = [self._adapters[step.adapter_id] for step in steps]
        return [planned[adapter.bank].outcome(adapter.slot) for adapter in stepped]

    # ------------------------------------------------------------ state

    def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        """A copy of the adapter, on the host."""
        adapter = self._adapters[adapter_id]
        bank, slot = adapter.bank, adapter.slot
        split = bank.layout.split
        optimizer = None
        if with_optimizer:
            optimizer = OptimizerState(
                step=bank.steps[slot],
                exp_avg=split(_host_copy(bank.exp_avg[slot])),
                exp_avg_sq=split(_host_copy(bank.exp_avg_sq[slot])),
            )
        return AdapterState(
            spec=adapter.spec,
            target_modules=bank.layout.modules,
            weights=split(_host_copy(bank.params[slot])),
            optimizer=optimizer,
            gradients=split(_host_copy(bank.gradient(slot))) if with_gradients else None,
        )

    def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        """Set an existing adapter of the same shape to `state`; what `state` leaves out (moments, gradient) is reset.

        The adapter takes over the state's alpha, so that it computes what the saved one did.

        Raises:
            InvalidRequest: if rank, target modules, names or shapes differ; then nothing has changed.
        """
        adapter = self._adapters[adapter_id]
        bank, slot, layout = adapter.bank, adapter.slot, adapter.bank.layout
        check_fits(state, adapter.spec, layout.modules, layout.shapes())
        bank.wipe(slot)
        bank.params[slot].copy_(layout.join(state.weights))
        if state.optimizer is not None:
            bank.exp_avg[slot].copy_(layout.join(state.optimizer.exp_avg))
            bank.exp_avg_sq[slot].copy_(layout.join(state.optimizer.exp_avg_sq))
            bank.steps[slot] = state.optimizer.step
        if state.gradients is not None:
            bank.grads[slot] = layout.join(state.gradients).to(bank.device)
        adapter.spec = replace(adapter.spec, alpha=state.spec.alpha)

    def close(self) -> None:
        """Forget all adapters. The base model goes with whoever holds it last."""
        self._adapters.clear()
        self._banks.clear()
        self._lanes.close()
        self._release_memory()


def _network(loaded: LoadedModel) -> Network:
    model = copy_sharing_weights(loaded.model)
    route = Route()
    wrap_linears(model, loaded.linears, lambda base, name: LoraLinear(base, name, route))
    wrap_experts(model, loaded.experts, route)
    output = cast("nn.Module", model.get_output_embeddings())

    def head(hidden: Tensor) -> Tensor:
        return finish_logits(output(hidden), model.config)

    weight = cast("Tensor", output.weight)
    body, recomputation = decoder(model), Recomputation()
    recompute_layers(body, recomputation)
    boundaries = rope_boundaries(model.config, loaded.info.max_context_length)
    return Network(body, head, weight.shape[0], route, recomputation, loaded.device, boundaries)


def _token_bytes(loaded: LoadedModel, network: Network) -> float:
    """Of a pass with terms on all layers, of rank 1."""
    bank = Bank(Layout.of([_shape(name, loaded.model) for name in loaded.targets], 1), loaded.device)
    adapter = Adapter(AdapterSpec(rank=1), bank, bank.take())
    scratch = BankScratch(bank, [adapter], keeps_gradients=True)

    def run(tokens: Tensor) -> Tensor:
        network.route.segments = [scratch.segment([adapter.slot] * len(tokens), needs_grad=True)]
        return network.hidden(tokens)

    try:
        return token_bytes(run, int(loaded.model.config.get_text_config().num_hidden_layers), loaded.device)
    finally:
        network.route.segments = []


def _shape(name: str, model: nn.Module) -> LinearShape:
    if is_expert_parameter(name):
        experts, out_features, in_features = model.get_parameter(name).shape
        return LinearShape(name, in_features, out_features, experts)
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return LinearShape(name, layer.in_features, layer.out_features)


def _host_copy(row: Tensor) -> Tensor:
    return row.detach().to("cpu", copy=True)
