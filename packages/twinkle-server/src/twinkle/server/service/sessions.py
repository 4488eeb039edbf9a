"""Sessions: creating, finding and listing them. `session_search` searches."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Set as AbstractSet

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Gone, NotFound, QuotaReached
from twinkle.server.config import LimitsSection
from twinkle.server.service.metadata import texts
from twinkle.server.service.validation import check_metadata
from twinkle.server.store import tables
from twinkle.server.store.database import Database

# An unfinished session counts as open for this long, if sessions don't expire.
_COUNTS_SECONDS = 86_400.0


def id_from_key(tenant: str, key: str | None) -> str:
    """A new id; the same one if the tenant repeats an idempotency key."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{tenant} {key}").hex if key else uuid.uuid4().hex


def create(
    database: Database,
    tenant: str,
    request: m.CreateSessionRequest,
    limits: LimitsSection,
    in_use: AbstractSet[str],
) -> m.CreateSessionResponse:
    """A new session, or the one with the same idempotency key. Blocking.

    Args:
        in_use: sessions of all tenants that may still get requests.

    Raises:
        InvalidRequest: if its metadata is too long.
        QuotaReached: if there would be too many sessions.
    """
    check_metadata(request.user_metadata, limits.max_metadata_bytes)
    session_id = id_from_key(tenant, request.idempotency_key)
    if database.session(tenant, session_id) is None:
        _make_room(database, tenant, limits, in_use)
        row = tables.Session(
            id=session_id,
            tenant=tenant,
            created_at=round(time.time(), 6),  # as exact as a search's cursor
            user_metadata=request.user_metadata,
            display_name=request.display_name,
            project_id=request.project_id,
        )
        database.put(row)
    return m.CreateSessionResponse(session_id=session_id)


def _make_room(database: Database, tenant: str, limits: LimitsSection, in_use: AbstractSet[str]) -> None:
    most = limits.max_sessions_per_tenant
    if most is None or database.count_sessions(tenant) < most:
        return
    since = time.time() - (limits.max_session_idle_seconds or _COUNTS_SECONDS)
    if database.delete_empty_sessions(tenant, since, in_use):
        return
    open_ones = database.count_sessions(tenant, open_since=since)
    if open_ones >= most:
        raise QuotaReached(
            f"limits.max_sessions_per_tenant: {open_ones} sessions are not finished, and this server allows {most}; "
            "finish some first (close their ServiceClients)"
        )


async def find(database: Database, tenant: str, session_id: str) -> tables.Session:
    """
    Raises:
        NotFound: if the tenant has no such session.
    """
    return _known(await asyncio.to_thread(database.session, tenant, session_id), session_id)


def _known(row: tables.Session | None, session_id: str) -> tables.Session:
    if row is None:
        raise NotFound(f"session_id: no session {session_id[:80]!r}; begin one with create_session")
    return row


async def find_open(database: Database, tenant: str, session_id: str) -> tables.Session:
    """
    Raises:
        NotFound: as `find`.
        Gone: if the session is finished.
    """
    row = await find(database, tenant, session_id)
    if row.finished_at is not None:
        raise Gone(f"session_id: session {session_id} is finished; begin a new one with create_session")
    return row


# ---------------------------------------------------------------- lists; blocking


def listed(database: Database, tenant: str, query: m.ListSessions) -> m.SessionList:
    ids = database.session_ids(tenant, query.limit, query.offset, query.project_id)
    return m.SessionList(sessions=ids)


def info(database: Database, tenant: str, query: m.GetSession) -> m.SessionInfo:
    """
    Raises:
        NotFound: as `find`.
    """
    row = _known(database.session(tenant, query.session_id), query.session_id)
    return m.SessionInfo(
        training_run_ids=database.run_ids(row.id),
        sampler_ids=database.sampler_ids(row.id),
        user_metadata=texts(row.user_metadata),
        display_name=row.display_name,
    )
