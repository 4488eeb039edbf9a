"""Training runs: creating, training, saving, loading and unloading them.

All but `GetInfoRequest` are operations: the service journals them and answers with a promise, the engine carries them
out, and the client fetches the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from twinkle.protocol.messages.base import Metadata, Number, Query, Ttl
from twinkle.protocol.types import AdamParams, Datum, LoraConfig, LossFnConfig, Texts, Value

# ---------------------------------------------------------------- a run's beginning and end


class CreateModelResponse(Value):
    """Engine to client: the run's id."""

    model_id: str
    type: Literal["create_model"] = "create_model"


class CreateModelRequest(Value):
    """Client to engine: begin a run with a new adapter."""

    session_id: str
    model_seq_id: Number
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})


class ModelData(Value):
    arch: str = "unknown"
    model_name: str
    tokenizer_id: str


class GetInfoResponse(Value):
    """Service to client; the SDK picks its tokenizer by it."""

    model_data: ModelData
    model_id: str
    is_lora: bool = True
    lora_rank: int
    model_name: str
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})
    type: Literal["get_info"] = "get_info"


class GetInfoRequest(Query[GetInfoResponse], method="POST", path="/get_info"):
    """Client to service: what run is this? The SDK asks for every training client it makes."""

    model_id: str


class UnloadModelResponse(Value):
    """Engine to native client."""

    model_id: str


class UnloadModelRequest(Value):
    """Native client or service to engine: end the run and free its adapter; checkpoints stay.

    Attributes:
        seq_id: its place in the run's order; None is after everything that has arrived.
    """

    model_id: str
    seq_id: int | None = None


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class ForwardBackwardRequest:
    """Client to engine: one training pass over some datums. Returns log-probabilities; unless `forward_only`, gradients
    accumulate in the adapter until the next `OptimStepRequest`. The result is `types.ForwardBackwardOutput`.
    """

    model_id: str
    seq_id: int
    data: list[Datum]
    loss_fn: str
    loss_fn_config: LossFnConfig = field(default_factory=dict[str, float | str])
    forward_only: bool = False


class OptimStepResponse(Value):
    """Engine to client: metrics of the step; `grad_norm:mean` is the L2 norm of the gradient before clipping."""

    metrics: dict[str, float] = Field(default_factory=dict[str, float])


class OptimStepRequest(Value):
    """Client to engine: apply the accumulated gradient.

    Attributes:
        adam_params: default: `AdamParams()`.
        optimizer_params: from SDKs with several optimizers; refused unless its type is AdamW.
    """

    model_id: str
    seq_id: int
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None


# ---------------------------------------------------------------- checkpoints of a run


class SaveWeightsResponse(Value):
    """Engine to client: the checkpoint's full name."""

    path: str
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsRequest(Value):
    """Client to engine: save weights and optimizer state, to train on from.

    Attributes:
        path: the checkpoint's name within the run.
    """

    model_id: str
    path: str
    seq_id: int
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsForSamplerResponse(Value):
    """Engine to client: `path` if the request named one, else the new sampling session."""

    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsForSamplerRequest(Value):
    """Client to engine: publish the weights for sampling, as a checkpoint named `path`, or else only for a new sampling
    session, `sampling_session_seq_id`.
    """

    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: Number | None = None
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata | None = None


class SaveWeightsExternalResponse(Value):
    """Engine to client."""

    path: str
    size_bytes: int
    type: Literal["save_weights_external"] = "save_weights_external"


class SaveWeightsExternalRequest(Value):
    """Client to engine: save the adapter to download, as `adapter_config.json` and `adapter_model.safetensors`."""

    model_id: str
    path: str
    seq_id: int
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: Texts | None = None


class LoadWeightsResponse(Value):
    """Engine to client."""

    path: str
    model_id: str
    type: Literal["load_weights"] = "load_weights"


class LoadWeightsRequest(Value):
    """Client to engine: load a checkpoint into a run (`model_id`, `seq_id`), or as a new run (`session_id`,
    `model_seq_id`).

    Attributes:
        optimizer: whether to load the optimizer state too, or begin with a new optimizer.
        weights_access_token: another tenant's API key, for a checkpoint of that tenant.
    """

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: Number | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})
    weights_access_token: str | None = Field(default=None, repr=False)
