"""Checkpoints and runs: finding, copying, publishing, downloading and deleting them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from twinkle.protocol.messages.base import AccessScope, Acknowledged, Metadata, Number, Offset, Query, Ttl
from twinkle.protocol.types import Value
from twinkle.protocol.uris import CheckpointKind

CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"

# ---------------------------------------------------------------- finding


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
    """Part of lists: which page of how many entries it is."""

    offset: int
    limit: int
    total_count: int


class CheckpointList(Value):
    """Service to client, newest first; `cursor` is None where the list is whole."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class ListCheckpoints(Query[CheckpointList], method="GET", path="/training_runs/{run_id}/checkpoints"):
    """Client to service: the checkpoints of one run, the caller's or another's published ones."""

    run_id: str


class ListUserCheckpoints(Query[CheckpointList], method="GET", path="/checkpoints"):
    """Client to service: all checkpoints of the caller."""

    limit: int = Field(default=100, ge=1, le=1000)
    offset: Offset = 0


class TrainingRun(Value):
    """Service to client, and part of `TrainingRunList`."""

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


class GetTrainingRun(Query[TrainingRun], method="GET", path="/training_runs/{run_id}"):
    run_id: str
    access_scope: AccessScope = "owned"


class TrainingRunList(Value):
    """Service to client, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class ListTrainingRuns(Query[TrainingRunList], method="GET", path="/training_runs"):
    limit: int = Field(default=20, ge=1, le=1000)
    offset: Offset = 0
    access_scope: AccessScope = "owned"
    project_id: str | None = None


class WeightsInfo(Value):
    """Service to client: base model and shape of a checkpoint."""

    base_model: str
    is_lora: bool = True
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    optimizer_config: dict[str, Any] = Field(default_factory=lambda: {"type": "adamw"})


class WeightsInfoRequest(Query[WeightsInfo], method="POST", path="/weights_info"):
    tinker_path: str


# ---------------------------------------------------------------- changing


class CopyWeightsResponse(Value):
    """Service to client: the copy's full name."""

    tinker_path: str


class CopyWeightsRequest(Query[CopyWeightsResponse], method="POST", path="/copy_weights"):
    """Client to service: copy a checkpoint to a run of its own, in a session, or in a new session of a project.

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


class _OneCheckpoint(Value):
    run_id: str
    kind: CheckpointKind
    name: str


class DeleteCheckpoint(_OneCheckpoint, Query[Acknowledged], method="DELETE", path=CHECKPOINT):
    """Client to service."""


class PublishCheckpoint(_OneCheckpoint, Query[Acknowledged], method="POST", path=CHECKPOINT + "/publish"):
    """Client to service: anyone with the checkpoint's full name may read it."""


class UnpublishCheckpoint(_OneCheckpoint, Query[Acknowledged], method="DELETE", path=CHECKPOINT + "/publish"):
    """Client to service: only its owner may read the checkpoint again."""


class SetCheckpointTtl(_OneCheckpoint, Query[Acknowledged], method="PUT", path=CHECKPOINT + "/ttl"):
    """Client to service: delete the checkpoint after so long; None keeps it."""

    ttl_seconds: Ttl | None


# ---------------------------------------------------------------- downloading


class ExternalWeightsUrls(Value):
    """Service to client: signed addresses by file name; anyone who has one can download until it expires."""

    urls: dict[str, str]
    expires: str

    @property
    def expires_at(self) -> datetime:
        return datetime.fromisoformat(self.expires)


class GetCheckpointUrls(
    _OneCheckpoint, Query[ExternalWeightsUrls], method="GET", path=CHECKPOINT + "/external_weights_urls"
):
    """Client to service: addresses of a checkpoint's files. The SDK asks only for those of external weights."""


class GetCheckpointArchive(_OneCheckpoint, Query[ExternalWeightsUrls]):
    """Gateway to service, for SDKs before 0.36: the address of a tar with a checkpoint's files."""


class GetTokenizerUrls(Query[ExternalWeightsUrls], method="GET", path="/tokenizer_urls"):
    """The patch of the SDK to service: addresses of a base model's tokenizer files. (A Twinkle addition.)"""

    base_model: str
