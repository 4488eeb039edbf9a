"""Checkpoints and runs: finding, copying, publishing, downloading and deleting them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from twinkle.protocol.messages.base import AccessScope, Metadata, Number, Offset, Ttl
from twinkle.protocol.types import Value
from twinkle.protocol.uris import CheckpointKind


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
