"""Training on a Transformers model: one frozen base, adapters in stacked banks.

    network           the model with adapters, as a pass calls it
    packed_rows       rows of different lengths behind each other
    passes            micro-batches to results and gradients
    sharding          a base that is spread over ranks; sharded_pass: their passes
    activations       what a pass keeps, measured; recomputed if it would be too much
    pass_memory       what fits, and what is done where memory runs out
    thread_parallel   a pass's rows shared out over CPU threads

The model is `hf`'s, the adapters are `lora`'s. Routed experts that are not plain gated layers get no low-rank term.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from twinkle.server.backends.hf.base_model import (
    LoadedModel,
    check_runs,
    copy_sharing_weights,
    decoder,
    finish_logits,
    load_base_model,
)
from twinkle.server.backends.hf.device_memory import giving_memory_back, release_cached
from twinkle.server.backends.hf.model_facts import affordable_tokens, bounded_batch_tokens, head_bytes
from twinkle.server.backends.hf.rope import rope_boundaries
from twinkle.server.backends.hf.threads import Threads
from twinkle.server.backends.lora.backend import LoraBackend
from twinkle.server.backends.lora.banks import Adapter, Bank, Layout, LinearShape
from twinkle.server.backends.lora.experts import ExpertsWithLora
from twinkle.server.backends.lora.linear import LoraLinear, TrainingRoute, wrap_modules
from twinkle.server.backends.lora.module_groups import ModuleGroup, is_expert_parameter
from twinkle.server.backends.lora.replicas import Replicas
from twinkle.server.backends.lora.scratch import BankScratch, commit
from twinkle.server.backends.protocol import AdapterSpec, BaseModelInfo, ModelConfig, Row, RowResult
from twinkle.server.backends.transformers.activations import Recomputation, recompute_layers, token_bytes
from twinkle.server.backends.transformers.network import LoraNetwork
from twinkle.server.backends.transformers.packed_rows import may_pack, packs, use_packed_attention
from twinkle.server.backends.transformers.pass_memory import PassLimits
from twinkle.server.backends.transformers.passes import Pass, run_pass
from twinkle.server.backends.transformers.sharded_pass import run_sharded_pass
from twinkle.server.backends.transformers.sharding import ShardedModel
from twinkle.server.backends.transformers.thread_parallel import MAX_NETWORKS, ParallelNetworks

log = logging.getLogger("twinkle.backend")

# The adapter of the largest micro-batch, tried at the start, and its rows.
_TRIAL = "trial"
_TRIAL_RANK = 32
_TRIAL_LENGTH = 2048


class TransformersBackend(LoraBackend):
    """See `twinkle.server.backends.protocol.TrainingBackend`."""

    def __init__(self, config: ModelConfig, loaded: LoadedModel | None = None) -> None:
        """
        Args:
            loaded: a model in this process to share the weights of; default: load `config.path`.

        Raises:
            InvalidRequest: if the model can't be loaded as `config` says.
        """
        self._loaded = loaded if loaded is not None else load_base_model(config)
        device = self._loaded.device
        replicas = Replicas(config, device) if config.data_parallel_size > 1 else None
        self._threads = Threads(self._loaded.model, device)
        # Those of a sharded base would gather at the same time, each rank's in another order.
        count = 1 if self._loaded.shards is not None else min(self._threads.most, MAX_NETWORKS)
        first = _first_network(self._loaded)
        self._networks = ParallelNetworks(
            [first, *(_network(self._loaded, first.packs) for _ in range(count - 1))]
        )
        self._check_runs(config)
        self._limits = _pass_limits(self._loaded, self._networks.first)
        info = replace(
            self._loaded.info,
            max_lora_rank=config.max_lora_rank,
            max_batch_tokens=bounded_batch_tokens(self._limits.affordable_tokens, device),
            max_adapter_bytes=self._loaded.memory.adapters,
            packs_rows=first.packs,
        )
        super().__init__(info if replicas is None else _info_of_all(info, replicas), device, replicas)
        if device.type == "cuda" and torch.version.cuda is not None and self._loaded.shards is None:
            self._try_full_pass(self._loaded.memory.adapters + self._loaded.memory.sampling)

    def _try_full_pass(self, beside: int) -> None:
        """Compute the largest micro-batch while others hold all they may: better now than in somebody's training that
        memory runs out. What fits is the limit from then on.

        Args:
            beside: bytes of the adapters' and the sampler's parts.

        Raises:
            InvalidRequest, ServerFault: if not even a single row fits.
        """
        device = self._loaded.device
        self.add_adapter(_TRIAL, AdapterSpec(rank=min(_TRIAL_RANK, self.info.max_lora_rank)))
        try:
            held = torch.empty(beside, dtype=torch.uint8, device=device)
            self._run([_full_micro_batch(self.info)])
            del held
        except torch.OutOfMemoryError:
            log.warning(
                "others have taken memory of %s since it was divided: less fits than was reckoned", device
            )
        finally:
            self.remove_adapter(_TRIAL)
            release_cached(device)
        found = self._limits.most_tokens
        most = found if self._replicas is None else min(self._replicas.gather(found))
        self._info = replace(self._info, max_batch_tokens=min(most, self._info.max_batch_tokens))

    @property
    def loaded(self) -> LoadedModel:
        """The base model, without adapters, for sharing its weights (unless they are spread over ranks)."""
        return self._loaded

    def _check_runs(self, config: ModelConfig) -> None:
        """What `load_base_model` could not check of a model that only all ranks together can run."""
        sharded = self._networks.first.sharded
        if sharded is not None:
            with torch.no_grad():
                sharded.run(lambda: check_runs(sharded.model, config))

    def _layout(self, rank: int, groups: frozenset[ModuleGroup]) -> Layout:
        targets = [name for name, group in self._loaded.targets.items() if group in groups]
        return Layout.of([_shape(name, self._loaded.model) for name in targets], rank)

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        """See `TrainingBackend`.

        Raises:
            InvalidRequest: if a row's loss, inputs or tokens are not possible, or a row alone doesn't fit.
            ServerFault: if memory has run out though it fits. The pass's memory has been freed; another can be run.
        """
        device = self._loaded.device
        if self._replicas is None:
            done = self._run(micro_batches)
            giving_memory_back(device, lambda: commit(done.scratches))
            return done.results
        if self._loaded.shards is not None:
            done = self._run_sharded(micro_batches, self._replicas)
        else:
            try:
                done = self._run(micro_batches)
            except Exception as error:
                done = error
        # A rank without rows takes part.
        trained = self._replicas.gather(done if isinstance(done, Exception) else done.trained)
        assert not isinstance(done, Exception), "else all ranks have raised"
        own = self._replicas.send_to_owners(done.scratches, self._adapters, trained)
        giving_memory_back(device, lambda: commit(own))
        return done.results

    def _run(self, micro_batches: Sequence[Sequence[Row]]) -> Pass:
        self._check_rows(micro_batches)
        return run_pass(self._networks, self._threads, self._adapters, micro_batches, self._limits)

    def _run_sharded(self, micro_batches: Sequence[Sequence[Row]], replicas: Replicas) -> Pass | Exception:
        refused = None
        try:
            self._check_rows(micro_batches)
        except Exception as error:
            refused = error
        compute = partial(
            run_sharded_pass,
            self._networks.first,
            self._threads,
            self._adapters,
            micro_batches,
            self._limits,
            replicas,
            refused,
        )
        return giving_memory_back(self._loaded.device, compute)

    def close(self) -> None:
        """Forget all adapters. The base model is freed with its last user."""
        super().close()
        self._networks.close()
        release_cached(self._loaded.device)


def _full_micro_batch(info: BaseModelInfo) -> list[Row]:
    """Rows that are as long as usual ones may be, of `max_batch_tokens` together."""
    length = min(_TRIAL_LENGTH, info.max_context_length, info.max_batch_tokens)
    tokens = np.ones(length, np.int64)
    inputs = {"target_tokens": tokens, "weights": np.ones(length, np.float32)}
    return [Row(_TRIAL, tokens, "cross_entropy", inputs)] * (info.max_batch_tokens // length)


def _info_of_all(info: BaseModelInfo, replicas: Replicas) -> BaseModelInfo:
    """What holds on all ranks. Each has weights of all adapters, and its share of their moments and gradients."""
    infos = replicas.gather(info)
    bytes_each = [one.max_adapter_bytes for one in infos if one.max_adapter_bytes is not None]
    return replace(
        info,
        max_batch_tokens=min(one.max_batch_tokens for one in infos),
        max_adapter_bytes=int(min(bytes_each) * replicas.size * 4 / (replicas.size + 3))
        if bytes_each
        else None,
        data_parallel_size=replicas.size,
    )


def _first_network(loaded: LoadedModel) -> LoraNetwork:
    """A network that packs rows if the model can; a base that is spread over ranks is left alone by the trial."""
    if loaded.shards is None and may_pack(loaded.model):
        network = _network(loaded, packs_rows=True)
        if packs(network.hidden, loaded.device):
            return network
    return _network(loaded, packs_rows=False)


def _network(loaded: LoadedModel, packs_rows: bool) -> LoraNetwork:
    model = copy_sharing_weights(loaded.model)
    if packs_rows:
        use_packed_attention(model.config)
    route = TrainingRoute()
    wrap_modules(model, loaded.linears, lambda base, name: LoraLinear(base, name, route))
    wrap_modules(model, loaded.experts, lambda base, name: ExpertsWithLora(base, name, route))
    output = cast("nn.Module", model.get_output_embeddings())

    def head(hidden: Tensor, first: int) -> Tensor:
        with route.narrowed(first, first + len(hidden)):
            return finish_logits(output(hidden), model.config)

    weight = cast("Tensor", output.weight)
    vocab_size = weight.shape[0]
    body, recomputation = decoder(model), Recomputation()
    recompute_layers(body, recomputation)
    boundaries = rope_boundaries(model.config, loaded.info.max_context_length)
    sharded = None if loaded.shards is None else ShardedModel(model, loaded.shards)
    return LoraNetwork(
        body,
        head,
        vocab_size,
        route,
        recomputation,
        loaded.device,
        loaded.dtype,
        boundaries,
        sharded,
        packs_rows,
    )


def _pass_limits(loaded: LoadedModel, network: LoraNetwork) -> PassLimits:
    text = loaded.model.config.get_text_config()
    layers, itemsize = int(text.num_hidden_layers), loaded.dtype.itemsize
    kept = _token_bytes(loaded, network)
    head = head_bytes(network.vocab_size, loaded.device)
    return PassLimits(
        affordable_tokens(kept, loaded.memory.passes, head),
        loaded.info.overhead_tokens,
        token_bytes=kept,
        # Each layer's input, and all that one layer keeps, with its gradients.
        recomputed_token_bytes=layers * int(text.hidden_size) * itemsize + 2 * kept / layers,
        head_bytes=head,
        packs=network.packs,
        itemsize=itemsize,
    )


def _token_bytes(loaded: LoadedModel, network: LoraNetwork) -> float:
    """For a pass with terms on all layers, of rank 1."""
    bank = Bank(Layout.of([_shape(name, loaded.model) for name in loaded.targets], 1), loaded.device)
    adapter = Adapter(AdapterSpec(rank=1), bank, bank.take())
    scratch = BankScratch(bank, [adapter], keeps_gradients=True)

    def run(tokens: Tensor) -> Tensor:
        network.route.segments = [
            scratch.segment([adapter.slot], [tokens.numel()], needs_grad=True, dtype=network.dtype)
        ]
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
