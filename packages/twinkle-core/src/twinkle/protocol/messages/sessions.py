"""Sessions: opening, keeping alive, finishing and finding them."""

from typing import Literal, TypeAlias

from pydantic import AwareDatetime, Field

from twinkle.protocol.messages.base import AccessScope, Metadata, Offset
from twinkle.protocol.types import Texts, Value


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
