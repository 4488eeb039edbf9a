"""Requests and replies. Each is defined once: the client builds them, the server reads them, and the other way round.

Requests that the SDK sends as JSON are pydantic models whose fields are the wire's; `ForwardBackwardRequest`, which
travels as protobuf, is a dataclass. Fields that we don't know are passed over, so that newer SDKs can talk to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import Field

from twinkle.protocol.errors import Category
from twinkle.protocol.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    LossFnConfig,
    ModelInput,
    SampleResponse,
    SamplingParams,
    Value,
)
from twinkle.protocol.uris import CheckpointKind

Metadata: TypeAlias = dict[str, Any]

# ---------------------------------------------------------------- handshake and session


class ClientConfigRequest(Value):
    sdk_version: str = ""


class ClientConfig(Value):
    """Flags of the SDK that this server sets; those left out keep the SDK's defaults."""

    proto_compress_fwdbwd: bool = True
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
    create_model_via_load_weights: bool = True


class DynamicConfig(Value):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False


class CreateSessionRequest(Value):
    tags: list[str] = Field(default_factory=list[str])
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class CreateSessionResponse(Value):
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None


class SessionHeartbeatRequest(Value):
    session_id: str


class SessionHeartbeatResponse(Value):
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishSessionRequest(Value):
    session_id: str
    reason: dict[str, Any] = Field(default_factory=dict[str, Any])
    detail: str | None = None


class SupportedModel(Value):
    """One base model of this server.

    Attributes:
        max_context_length: longest sequence, in tokens.
        max_lora_rank: highest rank of an adapter. (A Twinkle addition.)
        vocab_size: token ids are below it. (A Twinkle addition.)
    """

    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True
    max_lora_rank: int
    vocab_size: int


class GetServerCapabilities(Value):
    pass


class ServerCapabilities(Value):
    supported_models: list[SupportedModel]


# ---------------------------------------------------------------- training


class CreateModelRequest(Value):
    session_id: str
    model_seq_id: int
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
    type: Literal["get_info"] = "get_info"


class UnloadModelRequest(Value):
    """Give an adapter's place back; the run is over, its checkpoints stay."""

    model_id: str


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
    ttl_seconds: int | None = Field(default=None, ge=1)
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
    sampling_session_seq_id: int | None = None
    ttl_seconds: int | None = Field(default=None, ge=1)
    user_metadata: Metadata | None = None


class SaveWeightsForSamplerResponse(Value):
    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class LoadWeightsRequest(Value):
    """Into a run (`model_id` and `seq_id`), or as a new one (`session_id` and `model_seq_id`)."""

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None


class LoadWeightsResponse(Value):
    path: str
    model_id: str
    type: Literal["load_weights"] = "load_weights"


# ---------------------------------------------------------------- sampling


class CreateSamplingSessionRequest(Value):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class CreateSamplingSessionResponse(Value):
    sampling_session_id: str


class SampleRequest(Value):
    sampling_session_id: str
    seq_id: int
    prompt: ModelInput
    num_samples: int = Field(default=1, ge=1)
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)


class GetSampler(Value):
    sampler_id: str


class SamplerInfo(Value):
    sampler_id: str
    base_model: str
    model_path: str | None = None


# ---------------------------------------------------------------- promises and futures


class Promise(Value):
    """What the server has accepted; `RetrieveFutureRequest` fetches the result."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class RetrieveFutureRequest(Value):
    request_id: str
    allow_metadata_only: bool = False


QueueState: TypeAlias = Literal["active", "paused_capacity", "paused_rate_limit"]


class Pending(Value):
    """Not done yet: ask again."""

    request_id: str
    queue_state: QueueState = "active"
    queue_state_reason: str | None = None
    type: Literal["try_again"] = "try_again"


class Failure(Value):
    """An accepted operation failed."""

    error: str
    category: Category


# ---------------------------------------------------------------- checkpoints and runs


class WeightsInfoRequest(Value):
    tinker_path: str


class WeightsInfo(Value):
    base_model: str
    is_lora: bool = True
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


class Acknowledged(Value):
    """Done; there is nothing to tell."""


class ListCheckpoints(Value):
    run_id: str


class ListUserCheckpoints(Value):
    limit: int = Field(default=100, ge=1, le=1000)
    offset: int = Field(default=0, ge=0)


class DeleteCheckpoint(Value):
    run_id: str
    kind: CheckpointKind
    name: str


class GetTrainingRun(Value):
    run_id: str


class ListTrainingRuns(Value):
    limit: int = Field(default=20, ge=1, le=1000)
    offset: int = Field(default=0, ge=0)


class Checkpoint(Value):
    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: str
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: Metadata | None = None
    expires_at: str | None = None


class Cursor(Value):
    offset: int
    limit: int
    total_count: int


class CheckpointList(Value):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(Value):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool = True
    lora_rank: int
    corrupted: bool = False
    last_request_time: str
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: Metadata | None = None


class TrainingRunList(Value):
    training_runs: list[TrainingRun]
    cursor: Cursor


# ---------------------------------------------------------------- groups

Ordered: TypeAlias = (
    ForwardBackwardRequest
    | OptimStepRequest
    | SaveWeightsRequest
    | SaveWeightsForSamplerRequest
    | LoadWeightsRequest
)
"""Requests on a run that are applied in the order of `seq_id`."""

Operation: TypeAlias = Ordered | CreateModelRequest | UnloadModelRequest | SampleRequest
"""Requests that are answered with a promise."""

Query: TypeAlias = (
    CreateSessionRequest
    | SessionHeartbeatRequest
    | FinishSessionRequest
    | GetServerCapabilities
    | GetInfoRequest
    | CreateSamplingSessionRequest
    | GetSampler
    | WeightsInfoRequest
    | GetTrainingRun
    | ListTrainingRuns
    | ListCheckpoints
    | ListUserCheckpoints
    | DeleteCheckpoint
)
"""Requests that are answered at once."""

Reply: TypeAlias = (
    CreateSessionResponse
    | SessionHeartbeatResponse
    | Acknowledged
    | ServerCapabilities
    | GetInfoResponse
    | CreateSamplingSessionResponse
    | SamplerInfo
    | WeightsInfo
    | TrainingRun
    | TrainingRunList
    | CheckpointList
)
"""What a query is answered with."""

Result: TypeAlias = (
    ForwardBackwardOutput
    | OptimStepResponse
    | SaveWeightsResponse
    | SaveWeightsForSamplerResponse
    | LoadWeightsResponse
    | CreateModelResponse
    | UnloadModelResponse
    | SampleResponse
)
"""What a promise turns into."""
