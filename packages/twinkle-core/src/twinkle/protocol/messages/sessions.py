"""Sessions: opening, keeping alive, finishing and finding them."""

from typing import Literal, TypeAlias

from pydantic import AwareDatetime, Field

from twinkle.protocol.messages.base import AccessScope, Acknowledged, Metadata, Offset, Query
from twinkle.protocol.types import Texts, Value

# ---------------------------------------------------------------- a client's own


class CreateSessionResponse(Value):
    """Service to client. The SDK logs the two messages."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None


class CreateSessionRequest(Query[CreateSessionResponse], method="POST", path="/create_session"):
    """Client to service, before its first verb.

    Attributes:
        idempotency_key: travels as the header X-Idempotency-Key; the same key gives the same session.
    """

    tags: Texts = Field(default_factory=list[str])
    user_metadata: Metadata | None = None
    sdk_version: str = ""
    project_id: str | None = Field(default=None, max_length=128)
    display_name: str | None = Field(default=None, max_length=256)
    idempotency_key: str | None = Field(default=None, max_length=256)


class SessionHeartbeatResponse(Value):
    """Service to SDK."""

    type: Literal["session_heartbeat"] = "session_heartbeat"


class SessionHeartbeatRequest(Query[SessionHeartbeatResponse], method="POST", path="/session_heartbeat"):
    """SDK to service, every ten seconds: the client is still there. (The native client's polls say as much.)"""

    session_id: str


FinishReason: TypeAlias = Literal["success", "errored", "interrupted"]


class ClientFinish(Value):
    """Part of `FinishSessionRequest`: how the client says that its session ended."""

    type: FinishReason = "success"


class FinishSessionRequest(Query[Acknowledged], method="POST", path="/sessions/{session_id}/finish"):
    """Client to service, when it is closed: unload the session's runs."""

    session_id: str
    reason: ClientFinish = ClientFinish()
    detail: str | None = None


# ---------------------------------------------------------------- finding sessions


class SessionList(Value):
    """Service to client: ids, newest first."""

    sessions: list[str]


class ListSessions(Query[SessionList], method="GET", path="/sessions"):
    limit: int = Field(default=20, ge=1, le=1000)
    offset: Offset = 0
    access_scope: AccessScope = "owned"
    project_id: str | None = None


class SessionInfo(Value):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: Metadata | None = None
    display_name: str | None = None


class GetSession(Query[SessionInfo], method="GET", path="/sessions/{session_id}"):
    session_id: str
    access_scope: AccessScope = "owned"


class AssignSessionProject(Query[Acknowledged], method="PUT", path="/sessions/{session_id}/project"):
    """Client to service: count the session towards a project."""

    session_id: str
    project_id: str = Field(min_length=1, max_length=128)


class SearchOwner(Value):
    """Part of `SearchSessions`: only the caller's own sessions, or also others' (which are never shown here)."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] | None = None


class StatusQuery(Value):
    """Part of `SearchSessions`: a status that will do."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[FinishReason] | None = None


class SearchCursor(Value):
    """From the service with one page, back from the client to get the next."""

    last_created_at: AwareDatetime
    last_session_id: str


class ActiveStatus(Value):
    type: Literal["active"] = "active"


class ClientFinishedStatus(Value):
    """Part of `SessionSummary`: what `FinishSessionRequest` said."""

    reason: ClientFinish
    detail: str | None = None
    type: Literal["client_finished"] = "client_finished"


class SessionSummary(Value):
    """Part of `SearchSessionsResponse`; `status` is None if the session neither finished nor was heard from lately."""

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
    """Service to client: a page; the last has no `next_cursor`."""

    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None = None


class SearchSessions(Query[SearchSessionsResponse], method="POST", path="/sessions/search"):
    """Client to service: sessions, newest first. All conditions must hold, but either `session_id` or `display_name`.

    Attributes:
        user_metadata: exact pairs.
        display_name: words that must all occur in it, case ignored.
    """

    session_id: str | None = None
    project_ids: list[str] | None = Field(default=None, max_length=1000)
    user_metadata: dict[str, str] = Field(default_factory=dict[str, str])
    display_name: str | None = Field(default=None, min_length=1, max_length=1024)
    owner: SearchOwner = SearchOwner()
    statuses: list[StatusQuery] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursor | None = None


class TraceExport(Value):
    """Service to SDK; always "failed" here, since no traces are recorded."""

    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class ExportTrace(Query[TraceExport], method="GET", path="/sessions/{session_id}/trace_export"):
    """SDK to service."""

    session_id: str
