"""The interface of a training backend: numpy in, numpy out, one call at a time; knows no tenants, runs or HTTP.

A backend holds one frozen base model and any number of adapters on it. The engine packs the rows of many adapters
into micro-batches; the backend runs them together, and keeps each adapter's gradient and moments with the adapter.
Backends are found by entry points (group `twinkle.training_backends`): see `plugins`. Every backend passes the
contract suite in `twinkle.server.backends.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput
from twinkle.protocol.types import AdamParams, Array, Float32Array, Int64Array

DEFAULT_ALPHA = 32.0

ModuleGroup: TypeAlias = Literal["attn", "mlp", "unembed"]
"""What `train_attn`, `train_mlp` and `train_unembed` select; see `module_groups`."""

ALL_GROUPS: tuple[ModuleGroup, ...] = ("attn", "mlp", "unembed")


@dataclass(frozen=True)
class LossSpec:
    """What a loss reads, so that a request can be checked before it is queued.

    Attributes:
        inputs: what it needs besides `target_tokens`, float32 of the same shape.
        max_rank: 1 takes targets [T]; 2 also [T, K], with K candidates at each position.
        config: its parameters, with their defaults.
    """

    inputs: tuple[str, ...]
    max_rank: int = 1
    config: Mapping[str, float] = field(default_factory=dict[str, float])


LossSpecs: TypeAlias = Mapping[str, LossSpec]

TARGETS = "target_tokens"
"""The input of every loss: the tokens whose log-probabilities it is a function of."""

CUSTOM_LOSS = "custom"
"""A loss that a client has traced and uploaded; see `CustomLoss`."""


@dataclass(frozen=True, eq=False)
class CustomLoss:
    """A client's loss, as data; `custom_loss.check` has passed it.

    Attributes:
        inputs: what the graph's placeholders take, in order; `logprobs` first.
    """

    loss_id: str
    name: str
    inputs: tuple[CustomLossInput, ...]
    graph: CustomLossGraph


@dataclass(frozen=True)
class ModelConfig:
    """Which base model to load, and how.

    Attributes:
        path: directory with a Hugging Face config and safetensors.
        torch_dtype: "bfloat16" or "float32", of the frozen weights and the arithmetic. Adapters, their gradients and
            moments are always float32.
        device: "cpu", "cuda" or "cuda:N".
        deterministic: on a GPU, only kernels that give the same bits each time (see `backends.determinism`).
        max_lora_rank: highest rank of an adapter.
        max_context_length: longest sequence, in tokens; default: the limit in the model's own config.
        data_parallel_size: copies of the model, each on its own ranks, that share out the rows.
        shard_base: those are parts of one copy, which its ranks gather layer by layer.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: ranks that share out the layers.
        expert_parallel_size: ranks that share out the routed experts of a mixture of experts.
        sequence_parallel: whether tensor-parallel ranks also shard the activations between their matrix products along
            the sequence; default: only if needed.
        trains, samples: what the process does with the model; its memory is divided between the two.
        max_sampler_adapters: adapters that a sampling engine is asked to hold at once, about: those in use are never
            removed for others.
        rank: this process's place in the group of ranks, below `num_ranks`.
        rendezvous: where the ranks of the group meet (`backends.meeting`): "file://path", or "tcp://host:port" of a
            store that is open already; None for a single rank.
    """

    path: Path
    torch_dtype: str = "float32"
    device: str = "cpu"
    max_lora_rank: int = 128
    max_context_length: int | None = None
    data_parallel_size: int = 1
    shard_base: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    sequence_parallel: bool | None = None
    trains: bool = True
    samples: bool = True
    max_sampler_adapters: int = 64
    rank: int = 0
    rendezvous: str | None = None
    deterministic: bool = False

    @property
    def num_ranks(self) -> int:
        """Processes of all copies: experts are spread over the ranks that share (or copy) a stage."""
        of_stage = lcm(self.tensor_parallel_size, self.expert_parallel_size)
        return self.data_parallel_size * self.pipeline_parallel_size * of_stage


@dataclass(frozen=True)
class ExportFacts:
    """Facts about the base model that other programs' names for an adapter's parts depend on.

    Attributes:
        has_routed_experts: whether the model's family has them, in whatever layers.
        tied_head: whether the output head is the embedding's matrix.
        serving_class: the class in the model's config.json, if Transformers knows it and this one takes from it what
            the text model needs.
        renamed: (module's name here, its name in `serving_class`), each for everything inside that module too. Empty if
            the names are the same.
    """

    has_routed_experts: bool = False
    tied_head: bool = False
    serving_class: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()


PLAIN_MODEL = ExportFacts()
"""Facts of a dense model with its own head, whose parts have the same names in all programs."""


@dataclass(frozen=True)
class BaseModelInfo:
    """Facts about the base model that requests are checked against.

    Attributes:
        vocab_size: token ids are below it.
        max_context_length: longest sequence, in tokens.
        max_lora_rank: highest rank of an adapter.
        max_batch_tokens: most tokens in one micro-batch: rows x longest row, or all rows' lengths if it packs them.
        eos_token_ids: the tokens that end a sample without stops of its own.
        architecture: the model class's name.
        overhead_tokens: a micro-batch's fixed cost, in tokens. The same on every start, so that rows are always packed
            alike.
        max_adapter_bytes: most bytes of all adapters together, with moments and gradients, on all ranks together.
            Beyond it, adapters not in use are evicted; None: never.
        export: facts needed to write its adapters' files.
        trainable: the groups of layers that have any that can be trained.
        data_parallel_size: copies of the model that compute at the same time, each its own micro-batches.
        packs_rows: rows are computed behind each other, without padding.
        notes: lines about how it is computed, for whoever starts the server; a warning begins with "WARNING: ".
    """

    vocab_size: int
    max_context_length: int
    max_lora_rank: int
    max_batch_tokens: int
    eos_token_ids: tuple[int, ...]
    architecture: str
    overhead_tokens: int = 64
    max_adapter_bytes: int | None = None
    export: ExportFacts = field(default_factory=ExportFacts)
    trainable: tuple[ModuleGroup, ...] = ALL_GROUPS
    data_parallel_size: int = 1
    packs_rows: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSpec:
    """Shape and initialization of an adapter; the low-rank term is scaled by alpha / rank."""

    rank: int
    alpha: float = DEFAULT_ALPHA
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of a micro-batch.

    Attributes:
        adapter_id: the adapter that is applied, and whose gradient grows.
        tokens: int64 [T], T >= 1.
        loss_fn: name of the loss; the engine has checked that the backend knows it.
        loss_inputs: arrays by name, float32 or int64: `target_tokens` [T] or [T, K], and what else the loss needs; the
            engine has checked them.
        loss_config: the loss's parameters, numbers by name; missing ones have their defaults.
        forward_only: no gradient is kept.
        custom_loss: the loss itself, if `loss_fn` is "custom".
    """

    adapter_id: str
    tokens: Int64Array
    loss_fn: str
    loss_inputs: dict[str, Array]
    loss_config: Mapping[str, float] = field(default_factory=dict[str, float])
    forward_only: bool = False
    custom_loss: CustomLoss | None = None


@dataclass(frozen=True, eq=False)
class RowResult:
    """The result for one row.

    Attributes:
        logprobs: float32 of the targets' shape, log-probability of each target token under the untempered distribution.
        loss: the row's loss, a sum over its tokens.
        metrics: further `name:reduction` values of this row.
    """

    logprobs: Float32Array
    loss: float
    metrics: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class AdamStep:
    """A pending optimizer step of one adapter."""

    adapter_id: str
    params: AdamParams


StepOutcome: TypeAlias = dict[str, float] | InvalidRequest
"""A step's metrics: `grad_norm:mean`, the gradient's L2 norm before clipping. Or why it was refused."""


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """AdamW's moments, by PEFT parameter name, float32; `step` counts the steps taken."""

    step: int
    exp_avg: dict[str, Float32Array]
    exp_avg_sq: dict[str, Float32Array]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """All there is to an adapter, independent of any backend.

    Attributes:
        spec: its shape.
        target_modules: full names of the linear layers that it acts on, and of the parameters that hold a matrix for
            each routed expert (`...mlp.experts.gate_up_proj`).
        weights: by `base_model.model.{module}.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank], PEFT's
            names for those of linear layers, float32. For E experts A is [E * rank, in], expert by expert, and B [out,
            rank * E], grouped by rank, as in PEFT.
        optimizer: moments, or None.
        gradients: gradient accumulated since the last step, by PEFT name, or None.
    """

    spec: AdapterSpec
    target_modules: list[str]
    weights: dict[str, Float32Array]
    optimizer: OptimizerState | None = None
    gradients: dict[str, Float32Array] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        parts = [self.weights, self.gradients or {}]
        if self.optimizer is not None:
            parts += [self.optimizer.exp_avg, self.optimizer.exp_avg_sq]
        return sum(array.nbytes for arrays in parts for array in arrays.values())


class TrainingBackend(Protocol):
    """One base model, many adapters. Calls come one at a time, from one thread."""

    def __init__(self, config: ModelConfig) -> None:
        """Load the base model, frozen."""
        ...

    @property
    def info(self) -> BaseModelInfo: ...

    @property
    def loss_fns(self) -> LossSpecs:
        """The losses it computes, including `CUSTOM_LOSS` if it runs clients' own."""
        ...

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        """Make an adapter like PEFT's: A uniform (Kaiming, a = sqrt 5) from `spec.seed`, B zero, no moments."""
        ...

    def remove_adapter(self, adapter_id: str) -> None:
        """Remove an adapter: weights, gradient and moments are wiped before their memory is used again."""
        ...

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        """Run the micro-batches; add the gradients of the rows' losses to their adapters'.

        All or nothing: if it raises, no adapter's gradient has changed.
        """
        ...

    def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        """Apply the steps, each to its own adapter, and zero those adapters' gradients.

        A step that would make weights or moments non-finite is refused (see `backends.finite`): it only drops the
        gradient, and doesn't affect the other steps.

        Returns:
            For each step its metrics, or why it was refused.
        """
        ...

    def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        """A copy of the adapter."""
        ...

    def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        """Set an existing adapter of the same shape to `state`; anything missing there (moments, gradient) is reset.

        Raises:
            InvalidRequest: if rank or target modules differ; then nothing has changed.
        """
        ...

    def close(self) -> None: ...
