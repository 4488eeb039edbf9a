"""What a training backend is: numpy in, numpy out, one call at a time, no knowledge of tenants, runs or HTTP.

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
"""What `train_attn`, `train_mlp` and `train_unembed` are about; see `module_groups`."""

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
"""The input that every loss has: the tokens whose log-probabilities it is a function of."""

CUSTOM_LOSS = "custom"
"""The loss that a client has traced and uploaded; see `CustomLoss`."""


@dataclass(frozen=True, eq=False)
class CustomLoss:
    """A loss made by a client, as data; `custom_loss.check` has passed it.

    Attributes:
        inputs: what the graph's placeholders take, in order; `logprobs` first.
    """

    loss_id: str
    name: str
    inputs: tuple[CustomLossInput, ...]
    graph: CustomLossGraph


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it is to be held.

    Attributes:
        path: directory with a Hugging Face config and safetensors.
        torch_dtype: "bfloat16" or "float32": of the frozen weights and the arithmetic. Adapters, their
            gradients and moments are float32 always.
        device: "cpu", "cuda" or "cuda:N".
        max_lora_rank: highest rank of an adapter.
        max_context_length: longest sequence, in tokens; default: what the model's own config says.
        data_parallel_size: copies of the model, each on ranks of its own, that share out the rows.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: ranks that share out the layers.
        expert_parallel_size: ranks that share out the routed experts of a mixture of experts.
        sequence_parallel: whether tensor-parallel ranks also shard the activations between their matrix products along
            the sequence; default: where it is needed.
        rank: this process's place in the group of ranks, below `num_ranks`.
        rendezvous: where the ranks of the group meet, "tcp://host:port" or "file://path"; None where there is one rank.
    """

    path: Path
    torch_dtype: str = "float32"
    device: str = "cpu"
    max_lora_rank: int = 128
    max_context_length: int | None = None
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    sequence_parallel: bool | None = None
    rank: int = 0
    rendezvous: str | None = None

    @property
    def num_ranks(self) -> int:
        """Processes of all copies: experts are spread over the ranks that share (or copy) a stage."""
        of_stage = lcm(self.tensor_parallel_size, self.expert_parallel_size)
        return self.data_parallel_size * self.pipeline_parallel_size * of_stage


@dataclass(frozen=True)
class ExportFacts:
    """What other programs' names for the parts of an adapter depend on in the base model.

    Attributes:
        has_routed_experts: whether the model is of a family that has them, in whatever layers.
        tied_head: whether the output head is the embedding's matrix.
        serving_class: the class that the model's config.json names, if Transformers knows it and this one takes from
            it what the text model needs.
        renamed: (module's name here, its name in `serving_class`), each for all that lies in that module too. Empty
            where the names are the same.
    """

    has_routed_experts: bool = False
    tied_head: bool = False
    serving_class: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()


PLAIN_MODEL = ExportFacts()
"""Those of a dense model with a head of its own, whose parts all programs call alike."""


@dataclass(frozen=True)
class BaseModelInfo:
    """Facts about the base model that requests are checked against.

    Attributes:
        vocab_size: token ids are below it.
        max_context_length: longest sequence, in tokens.
        max_lora_rank: highest rank of an adapter.
        max_batch_tokens: most tokens (rows x longest row) in one micro-batch.
        eos_token_ids: the tokens that end a text where a sample names no stop.
        architecture: the model class's name.
        overhead_tokens: what a micro-batch costs beside its tokens, in tokens. The same on every start, so that rows
            are always packed alike.
        max_adapter_bytes: what all adapters may take together, with moments and gradients, on all ranks together.
            Beyond it those that are not in use are taken off; None: never.
        export: what its adapters' files are written by.
        trainable: the groups of layers of which there are any that can be trained.
        data_parallel_size: copies of the model that compute at the same time, each micro-batches of its own.
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


@dataclass(frozen=True)
class AdapterSpec:
    """Shape and start of an adapter; the low-rank term is scaled by alpha / rank."""

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
        adapter_id: whose term is added, and whose gradient grows.
        tokens: int64 [T], T >= 1.
        loss_fn: name of the loss; the engine has checked that the backend knows it.
        loss_inputs: arrays by name, float32 or int64: `target_tokens` [T] or [T, K], and what the loss needs besides;
            the engine has checked them.
        loss_config: the loss's parameters, numbers by name; what is left out has its default.
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
    """What came of a row.

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
    """An optimizer step that is due for one adapter."""

    adapter_id: str
    params: AdamParams


StepOutcome: TypeAlias = dict[str, float] | InvalidRequest
"""Metrics of a step: `grad_norm:mean`, the gradient's L2 norm before clipping. Or why it was not made."""


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """AdamW's moments, by PEFT parameter name, float32; `step` counts the steps taken."""

    step: int
    exp_avg: dict[str, Float32Array]
    exp_avg_sq: dict[str, Float32Array]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """All there is to an adapter, outside of any backend.

    Attributes:
        spec: its shape.
        target_modules: full names of the linear layers that it acts on, and of the parameters that hold a matrix for
            each routed expert (`...mlp.experts.gate_up_proj`).
        weights: by `base_model.model.{module}.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank], as PEFT
            names those of linear layers, float32. Of E experts A is [E * rank, in], expert by expert, and B
            [out, rank * E], where the experts of a rank stand together, as PEFT has them.
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
        """The losses it computes; `CUSTOM_LOSS` among them if it runs clients' own."""
        ...

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        """Make an adapter as PEFT would: A uniform (Kaiming, a = sqrt 5) from `spec.seed`, B zero, no moments."""
        ...

    def remove_adapter(self, adapter_id: str) -> None:
        """Forget an adapter: weights, gradient and moments are wiped before their place is used again."""
        ...

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        """Run the micro-batches; add gradients of the rows' losses to their adapters'.

        All or nothing: if it raises, no adapter's gradient has changed.
        """
        ...

    def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        """Apply the steps, each to its own adapter, and zero those adapters' gradients.

        A step that would leave weights or moments that are not finite is not made (see `backends.finite`): only the
        gradient goes, and the others are made as if it were not there.

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
        """Set an existing adapter of the same shape to `state`; what `state` leaves out (moments, gradient) is reset.

        Raises:
            InvalidRequest: if rank or target modules differ; then nothing has changed.
        """
        ...

    def close(self) -> None: ...
