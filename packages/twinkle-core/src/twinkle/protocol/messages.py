"""Requests and replies. Each is defined once: the client builds them, the server reads them, and the other way round.

Requests that the SDK sends as JSON are pydantic models whose fields are the wire's; `ForwardBackwardRequest`, which
travels as protobuf, is a dataclass. Fields that we don't know are passed over, so that newer SDKs can talk to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AwareDatetime, FailFast, Field

from twinkle.protocol.errors import Category
from twinkle.protocol.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    JsonTensor,
    LoraConfig,
    LossFnConfig,
    ModelInput,
    SampleResponse,
    SamplingParams,
    Texts,
    Value,
)
from twinkle.protocol.uris import CheckpointKind

Metadata: TypeAlias = dict[str, Any]

# What fits into a database's integer.
_LARGEST = 2**63 - 1
Number: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
"""How a client counts its runs, sampling sessions, losses and samples; part of their ids."""
Offset: TypeAlias = Annotated[int, Field(ge=0, le=_LARGEST)]
Ttl: TypeAlias = Annotated[int, Field(ge=1, le=100 * 365 * 86_400)]
"""Seconds, at most a hundred years: a later date can't be written."""

# ---------------------------------------------------------------- handshake and session


class ClientConfigRequest(Value):
    sdk_version: str = ""


class ClientConfig(Value):
    """Flags of the SDK that this server sets; those left out keep the SDK's defaults."""

    pjwt_auth_enabled: bool = True
    proto_compress_fwdbwd: bool = True
    custom_loss_server_side: bool = True
    sample_use_retrieve_futures: bool = True
    sample_join_sampling_session: bool = True
    # The SDK's other transport has threads in Rust. Before Python 3.14 a reply that arrives while a program ends makes
    # the interpreter end such a thread in the middle of a call, and the process aborts: 4 of 64 programs that sampled.
    use_pyqwest_transport: bool = False
    # What older SDKs (0.22 to 0.36) look at; the present one passes them over.
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
    create_model_via_load_weights: bool = True


class DynamicConfig(Value):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = True


class AuthTokenResponse(Value):
    """A token that stands for the caller's key for a while: a JWT (RFC 7519)."""

    jwt: str


class CreateSessionRequest(Value):
    """`idempotency_key` travels as the header X-Idempotency-Key: the same key gives the same session."""

    tags: Texts = Field(default_factory=list[str])
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: str | None = Field(default=None, max_length=128)
    display_name: str | None = Field(default=None, max_length=256)
    idempotency_key: str | None = Field(default=None, max_length=256)


class CreateSessionResponse(Value):
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None


class SessionHeartbeatRequest(Value):
    session_id: str


class SessionHeartbeatResponse(Value):
    type: Literal["session_heartbeat"] = "session_heartbeat"


FinishReason: TypeAlias = Literal["success", "errored", "interrupted"]


class ClientFinish(Value):
    """How a client says that its session ended."""

    type: FinishReason = "success"


class FinishSessionRequest(Value):
    session_id: str
    reason: ClientFinish = ClientFinish()
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


# ---------------------------------------------------------------- custom losses


class CustomLossInput(Value):
    """An input of a custom loss: `logprobs`, or a name in `loss_fn_inputs`; rank 1 is [T], 2 is [T, K], 0 a scalar."""

    name: str
    rank: Literal[0, 1, 2]


class CustomLossNode(Value):
    """One operation of a traced loss, as torch.fx writes it down.

    Attributes:
        op: placeholder, call_function, call_method or output (others exist, and are refused).
        name: later nodes refer to it.
        target: the parameter's, function's or method's name.
        args, kwargs: JSON values; what JSON has no word for is an object of one key, such as `{"ref": node}`,
            `{"tuple": [...]}`, `{"dict": {...}}`, `{"slice": [start, stop, step]}`, `{"ellipsis": true}`,
            `{"float": "inf"}`, `{"dtype": "float32"}`, `{"device": "cpu"}`.
    """

    op: str
    name: str
    target: str
    args: list[Any] = Field(default_factory=list[Any])
    kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])


class CustomLossGraph(Value):
    """A traced loss as data. What it names is looked up in an allow-list, never executed as code."""

    format: Literal[1] = 1
    nodes: Annotated[list[CustomLossNode], FailFast()]


class CreateCustomLossRequest(Value):
    session_id: str
    custom_loss_seq_id: Number
    name: str = Field(max_length=256)
    inputs: Annotated[list[CustomLossInput], FailFast()]
    graph: CustomLossGraph


class CreateCustomLossResponse(Value):
    """`loss_id` names the loss in the config of `forward_backward(..., "custom", {"loss_id": ...})`."""

    loss_id: str
    type: Literal["create_custom_loss"] = "create_custom_loss"


# ---------------------------------------------------------------- sampling


class CreateSamplingSessionRequest(Value):
    session_id: str
    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class CreateSamplingSessionResponse(Value):
    sampling_session_id: str


class JoinSamplingSessionRequest(Value):
    """One more client of a sampling session, with sequence ids of its own."""

    sampling_session_id: str


class JoinSamplingSessionResponse(Value):
    """`client_counter` is 1 for the first that joins; the client that made the session is 0."""

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class SampleRequest(Value):
    """Continue a prompt, and score it.

    Attributes:
        target_prompt_logprobs: token ids to score, int64 [len(prompt) - 1, K]; row i is scored at prompt position
            i + 1, and -1 asks for nothing.
        prompt_alt_tokens_k: how many alternatives to draw at each prompt position after the first.
        prompt_logprobs_last_n: score only the last so many tokens of the prompt.
        record_stability_info: for stable_reinforce, which no server of ours has: refused if true.
    """

    sampling_session_id: str
    seq_id: Number
    prompt: ModelInput
    num_samples: int = Field(default=1, ge=1)
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    target_prompt_logprobs: JsonTensor | None = None
    prompt_alt_tokens_k: int = Field(default=0, ge=0)
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    record_stability_info: bool = False


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
    """With `allow_metadata_only` a large result may be announced by its size first."""

    request_id: str
    allow_metadata_only: bool = False


class CompleteMetadata(Value):
    """The result is there, and is so large: ask for it when there is room."""

    response_payload_size: int
    status: Literal["complete_metadata"] = "complete_metadata"


class CancelFutureRequest(Value):
    """Nobody waits for this sample any more."""

    request_id: str


class SamplingSessionTarget(Value):
    """One client of a sampling session: that which made it is 0, others have the number they were given on joining."""

    sampling_session_id: str
    cloned_sampler_id: Number = 0
    type: Literal["sampling_session"] = "sampling_session"


class RetrieveFuturesRequest(Value):
    """Which samples of a client have ended since `prev_cursor`; one long poll for all of them.

    Attributes:
        prev_cursor: that of the previous reply; what came up to it has been seen.
        timeout: seconds; 0 answers at once, None waits as long as the server likes.
        retrieved_request_ids: results that have arrived at the client.
    """

    target: SamplingSessionTarget
    prev_cursor: Offset = 0
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: Texts = Field(default_factory=list[str])


class Completion(Value):
    """A sample that has ended."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class RetrieveFuturesResponse(Value):
    completions: list[Completion]
    cursor: int


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
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})


class CopyWeightsRequest(Value):
    """A copy of a checkpoint under a run of its own: in a session, or in a new one of a project.

    Attributes:
        weights_access_token: another tenant's API key, for a checkpoint of that tenant.
        idempotency_key: travels as the header X-Idempotency-Key; the same key gives the same copy.
    """

    source_path: str
    session_id: str | None = None
    model_seq_id: Number | None = None
    destination_project_id: str | None = Field(default=None, max_length=128)
    ttl_seconds: Ttl | None = None
    weights_access_token: str | None = Field(default=None, repr=False)
    idempotency_key: str | None = Field(default=None, max_length=256)


class CopyWeightsResponse(Value):
    tinker_path: str


class Acknowledged(Value):
    """Done; there is nothing to tell."""


AccessScope: TypeAlias = Literal["owned", "accessible"]
"""One's own, or also what others have published."""


class ListCheckpoints(Value):
    run_id: str


class ListUserCheckpoints(Value):
    limit: int = Field(default=100, ge=1, le=1000)
    offset: Offset = 0


class _OneCheckpoint(Value):
    run_id: str
    kind: CheckpointKind
    name: str


class DeleteCheckpoint(_OneCheckpoint):
    pass


class PublishCheckpoint(_OneCheckpoint):
    """Let everybody who has its full name read the checkpoint."""


class UnpublishCheckpoint(_OneCheckpoint):
    """Keep the checkpoint to its owner again."""


class SetCheckpointTtl(_OneCheckpoint):
    """Delete the checkpoint after so long; None keeps it."""

    ttl_seconds: Ttl | None


class GetCheckpointUrls(_OneCheckpoint):
    """Addresses to download a checkpoint's files from; the SDK asks for those of external weights alone."""


class GetCheckpointArchive(_OneCheckpoint):
    """The address of a tar with a checkpoint's files."""


class ExternalWeightsUrls(Value):
    """Signed addresses by file name; whoever has one can download until it expires."""

    urls: dict[str, str]
    expires: str

    @property
    def expires_at(self) -> datetime:
        return datetime.fromisoformat(self.expires)


class GetTokenizerUrls(Value):
    """Addresses to download a base model's tokenizer from. (A Twinkle addition.)"""

    base_model: str


class GetTrainingRun(Value):
    run_id: str
    access_scope: AccessScope = "owned"


class ListTrainingRuns(Value):
    limit: int = Field(default=20, ge=1, le=1000)
    offset: Offset = 0
    access_scope: AccessScope = "owned"
    project_id: str | None = None


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


# ---------------------------------------------------------------- sessions


class ListSessions(Value):
    limit: int = Field(default=20, ge=1, le=1000)
    offset: Offset = 0
    access_scope: AccessScope = "owned"
    project_id: str | None = None


class SessionList(Value):
    """Ids, newest first."""

    sessions: list[str]


class GetSession(Value):
    session_id: str
    access_scope: AccessScope = "owned"


class SessionInfo(Value):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: Metadata | None = None
    display_name: str | None = None


class AssignSessionProject(Value):
    session_id: str
    project_id: str = Field(min_length=1, max_length=128)


class SearchOwner(Value):
    """Whose sessions: one's own, or also others' (which are never shown here)."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] | None = None


class StatusQuery(Value):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[FinishReason] | None = None


class SearchCursor(Value):
    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessions(Value):
    """Sessions, newest first. Every condition must hold, but of `session_id` and `display_name` either will do.

    Attributes:
        user_metadata: exact pairs.
        display_name: words that all occur in it, in any case.
    """

    session_id: str | None = None
    project_ids: list[str] | None = Field(default=None, max_length=1000)
    user_metadata: dict[str, str] = Field(default_factory=dict[str, str])
    display_name: str | None = Field(default=None, min_length=1, max_length=1024)
    owner: SearchOwner = SearchOwner()
    statuses: list[StatusQuery] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursor | None = None


class ActiveStatus(Value):
    type: Literal["active"] = "active"


class ClientFinishedStatus(Value):
    reason: ClientFinish
    detail: str | None = None
    type: Literal["client_finished"] = "client_finished"


class SessionSummary(Value):
    """`status` is None of a session that neither finished nor was heard of lately."""

    session_id: str
    created_at: str
    owner: str
    project_id: str
    status: ActiveStatus | ClientFinishedStatus | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: Metadata | None = None
    checkpoint_storage_bytes: int | None = None


class SearchSessionsResponse(Value):
    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None = None


class ExportTrace(Value):
    session_id: str


class TraceExport(Value):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


# ---------------------------------------------------------------- accounts


class GetApiKey(Value):
    """The key that the request was sent with."""


class OrgDetails(Value):
    name: str


class UserDetails(Value):
    email: str


class KeyDetails(Value):
    org_details: OrgDetails
    user_details: UserDetails


class ApiKeyInfo(Value):
    key_id: int
    name: str
    note: str
    details: KeyDetails


class DeleteApiKey(Value):
    """Revoke the key that the request was sent with."""


class GetAuditLog(Value):
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all"
    day: date | None = None


class AuditEntry(Value):
    """`event` is what was done to what, such as checkpoint_delete."""

    timestamp: str
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict[str, Any])
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLog(Value):
    """One day's entries, oldest first."""

    entries: list[AuditEntry]


class GetUsage(Value):
    """Usage by hour; both ends on the hour, at most 14 days apart."""

    starting_on: AwareDatetime
    ending_before: AwareDatetime


class UsageInfo(Value):
    """What was used: tokens trained on, read as prompts, or generated; or checkpoints written."""

    type: Literal["training", "sampling_prefill", "sampling_sample", "checkpoint"]
    token_count: int | None = None
    count: int | None = None
    cached: bool | None = None


class UsageEvent(Value):
    """One hour's usage of one kind in one session. There are no prices: `estimated_cost_usd` is never set."""

    bucket_start: str
    bucket_end: str
    base_model: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    event_info: UsageInfo


class UsageSession(Value):
    user_metadata: Metadata | None = None


class Usage(Value):
    data: list[UsageEvent]
    sessions: dict[str, UsageSession] = Field(default_factory=dict[str, UsageSession])


class GetStorageUsage(Value):
    project_id: str | None = None


class StorageUsageItem(Value):
    project_id: str | None = None
    org_user_urn: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float


class StorageUsage(Value):
    """Checkpoints that there are now, by project."""

    data: list[StorageUsageItem]


# ---------------------------------------------------------------- groups

Ordered: TypeAlias = (
    ForwardBackwardRequest
    | OptimStepRequest
    | SaveWeightsRequest
    | SaveWeightsForSamplerRequest
    | SaveWeightsExternalRequest
    | LoadWeightsRequest
)
"""Requests on a run that are applied in the order of `seq_id`."""

Operation: TypeAlias = (
    Ordered | CreateModelRequest | UnloadModelRequest | SampleRequest | CreateCustomLossRequest
)
"""Requests that are answered with a promise."""

Query: TypeAlias = (
    CreateSessionRequest
    | SessionHeartbeatRequest
    | FinishSessionRequest
    | GetServerCapabilities
    | GetInfoRequest
    | CreateSamplingSessionRequest
    | JoinSamplingSessionRequest
    | GetSampler
    | CancelFutureRequest
    | RetrieveFuturesRequest
    | WeightsInfoRequest
    | CopyWeightsRequest
    | GetTrainingRun
    | ListTrainingRuns
    | ListCheckpoints
    | ListUserCheckpoints
    | DeleteCheckpoint
    | PublishCheckpoint
    | UnpublishCheckpoint
    | SetCheckpointTtl
    | GetCheckpointUrls
    | GetCheckpointArchive
    | GetTokenizerUrls
    | ListSessions
    | GetSession
    | AssignSessionProject
    | SearchSessions
    | ExportTrace
    | GetApiKey
    | DeleteApiKey
    | GetAuditLog
    | GetUsage
    | GetStorageUsage
)
"""Requests that are answered at once (or, where the request says how long to wait, by then)."""

Reply: TypeAlias = (
    CreateSessionResponse
    | SessionHeartbeatResponse
    | Acknowledged
    | ServerCapabilities
    | GetInfoResponse
    | CreateSamplingSessionResponse
    | JoinSamplingSessionResponse
    | SamplerInfo
    | RetrieveFuturesResponse
    | WeightsInfo
    | CopyWeightsResponse
    | TrainingRun
    | TrainingRunList
    | CheckpointList
    | ExternalWeightsUrls
    | SessionList
    | SessionInfo
    | SearchSessionsResponse
    | TraceExport
    | ApiKeyInfo
    | AuditLog
    | Usage
    | StorageUsage
)
"""What a query is answered with."""

Result: TypeAlias = (
    ForwardBackwardOutput
    | OptimStepResponse
    | SaveWeightsResponse
    | SaveWeightsForSamplerResponse
    | SaveWeightsExternalResponse
    | LoadWeightsResponse
    | CreateModelResponse
    | UnloadModelResponse
    | SampleResponse
    | CreateCustomLossResponse
)
"""What a promise turns into."""
