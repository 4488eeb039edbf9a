"""Training runs: creating, training, saving, loading and unloading them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from twinkle.protocol.messages.base import Metadata, Number, Ttl
from twinkle.protocol.types import AdamParams, Datum, LoraConfig, LossFnConfig, Texts, Value


class CreateModelRequest(Value):
    session_id: str
    model_seq_id: Number
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})


class CreateModelResponse(Value):
    model_id: str
    type: Literal["create_model"] = "create_model"


class GetInfoRequest(Value):
    model_id: str


class ModelData(Value):
    arch: str = "unknown"
    model_name: str
    tokenizer_id: str


class GetInfoResponse(Value):
    model_data: ModelData
    model_id: str
    is_lora: bool = True
    lora_rank: int
    model_name: str
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})
    type: Literal["get_info"] = "get_info"


class UnloadModelRequest(Value):
    """Give an adapter's place back; the run is over, its checkpoints stay.

    Attributes:
        seq_id: its place in the run's order; None is after all that has arrived.
    """

    model_id: str
    seq_id: int | None = None


class UnloadModelResponse(Value):
    model_id: str


@dataclass(frozen=True)
class ForwardBackwardRequest:
    """One training pass over some datums: log-probabilities, and unless `forward_only` gradients that add up in the
    adapter until the next `OptimStepRequest`.
    """

    model_id: str
    seq_id: int
    data: list[Datum]
    loss_fn: str
    loss_fn_config: LossFnConfig = field(default_factory=dict[str, float | str])
    forward_only: bool = False


class OptimStepRequest(Value):
    model_id: str
    seq_id: int
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None


class OptimStepResponse(Value):
    """Metrics of the step: `grad_norm:mean` is the L2 norm of the gradient before clipping."""

    metrics: dict[str, float] = Field(default_factory=dict[str, float])


class SaveWeightsRequest(Value):
    model_id: str
    path: str
    seq_id: int
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveWeightsResponse(Value):
    path: str
    type: Literal["save_weights"] = "save_weights"


class SaveWeightsForSamplerRequest(Value):
    """Named: `path`. Unnamed: `sampling_session_seq_id`, and a sampling session comes back."""

    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: Number | None = None
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata | None = None


class SaveWeightsForSamplerResponse(Value):
    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveWeightsExternalRequest(Value):
    """Save the adapter as files that can be downloaded: `adapter_config.json` and `adapter_model.safetensors`."""

    model_id: str
    path: str
    seq_id: int
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: Texts | None = None


class SaveWeightsExternalResponse(Value):
    path: str
    size_bytes: int
    type: Literal["save_weights_external"] = "save_weights_external"


class LoadWeightsRequest(Value):
    """Into a run (`model_id` and `seq_id`), or as a new one (`session_id` and `model_seq_id`).

    Attributes:
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


class LoadWeightsResponse(Value):
    path: str
    model_id: str
    type: Literal["load_weights"] = "load_weights"
