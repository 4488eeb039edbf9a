"""Sessions: made, heard of, finished, listed, searched."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import cast

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Gone, NotFound
from twinkle.server.service.metadata import iso, texts
from twinkle.server.store import tables
from twinkle.server.store.database import Database

# A client that was not heard of for so long (the SDK sends a heartbeat every 10 s) no longer counts as active.
ACTIVE_SECONDS = 120.0

_SEARCH_PAGE = 200


def id_from_key(tenant: str, key: str | None) -> str:
    """A new id; the same one if the tenant sends the same idempotency key again."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{tenant} {key}").hex if key else uuid.uuid4().hex


async def create(database: Database, tenant: str, request: m.CreateSessionRequest) -> m.CreateSessionResponse:
    session_id = id_from_key(tenant, request.idempotency_key)
    if await asyncio.to_thread(database.session, tenant, session_id) is None:
        row = tables.Session(
            id=session_id,
            tenant=tenant,
            created_at=round(time.time(), 6),  # as exact as a search's cursor can say it
            user_metadata=request.user_metadata,
            display_name=request.display_name,
            project_id=request.project_id,
        )
        await asyncio.to_thread(database.put, row)
    return m.CreateSessionResponse(session_id=session_id)


async def find(database: Database, tenant: str, session_id: str) -> tables.Session:
    """
    Raises:
        NotFound: if there is no such session of the tenant's.
    """
    row = await asyncio.to_thread(database.session, tenant, session_id)
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


# ---------------------------------------------------------------- lists and search


async def listed(database: Database, tenant: str, query: m.ListSessions) -> m.SessionList:
    rows = await asyncio.to_thread(database.sessions, tenant, query.limit, query.offset, query.project_id)
    return m.SessionList(sessions=[row.id for row in rows])


async def info(database: Database, tenant: str, query: m.GetSession) -> m.SessionInfo:
    row = await find(database, tenant, query.session_id)
    return m.SessionInfo(
        training_run_ids=await asyncio.to_thread(database.run_ids, row.id),
        sampler_ids=await asyncio.to_thread(database.sampler_ids, row.id),
        user_metadata=texts(row.user_metadata),
        display_name=row.display_name,
    )


async def search(
    database: Database, tenant: str, query: m.SearchSessions, active: AbstractSet[str]
) -> m.SearchSessionsResponse:
    """A page of the tenant's sessions that fulfil all conditions.

    Args:
        active: the sessions that have been heard of lately.
    """
    return await asyncio.to_thread(_search, database, tenant, query, active)


def _search(
    database: Database, tenant: str, query: m.SearchSessions, active: AbstractSet[str]
) -> m.SearchSessionsResponse:
    now = time.time()
    cursor = query.cursor
    before = (cursor.last_created_at.timestamp(), cursor.last_session_id) if cursor else None
    found: list[tables.Session] = []
    while len(found) <= query.limit:
        page = database.sessions(tenant, _SEARCH_PAGE, before=before)
        found += [row for row in page if _matches(row, query, _status(row, active, now), tenant)]
        if len(page) < _SEARCH_PAGE:
            break
        before = (page[-1].created_at, page[-1].id)
    shown = found[: query.limit]
    totals = database.checkpoint_totals([row.id for row in shown], now)
    next_cursor = None
    if len(found) > len(shown):
        created = datetime.fromtimestamp(shown[-1].created_at, UTC)
        next_cursor = m.SearchCursor(last_created_at=created, last_session_id=shown[-1].id)
    return m.SearchSessionsResponse(
        sessions=[_summary(row, _status(row, active, now), totals.get(row.id, (0, 0))) for row in shown],
        next_cursor=next_cursor,
    )


def _matches(
    row: tables.Session,
    query: m.SearchSessions,
    status: m.ActiveStatus | m.ClientFinishedStatus | None,
    tenant: str,
) -> bool:
    if query.owner.type == "user" and tenant not in (query.owner.owner_urns or []):
        return False
    if query.project_ids is not None and row.project_id not in query.project_ids:
        return False
    own = texts(row.user_metadata) or {}
    if any(own.get(key) != value for key, value in query.user_metadata.items()):
        return False
    if query.statuses is not None and not any(_has_status(status, wanted) for wanted in query.statuses):
        return False
    name = (row.display_name or "").lower()
    named = query.display_name is not None and all(
        word in name for word in query.display_name.lower().split()
    )
    return named or row.id == query.session_id or query.display_name is query.session_id is None


def _has_status(status: m.ActiveStatus | m.ClientFinishedStatus | None, wanted: m.StatusQuery) -> bool:
    if status is None or status.type != wanted.type:
        return False
    if isinstance(status, m.ClientFinishedStatus) and wanted.reasons is not None:
        return status.reason.type in wanted.reasons
    return True


def _status(
    row: tables.Session, active: AbstractSet[str], now: float
) -> m.ActiveStatus | m.ClientFinishedStatus | None:
    if row.finished_at is not None:
        reason = m.ClientFinish(type=cast(m.FinishReason, row.finish_reason or "success"))
        return m.ClientFinishedStatus(reason=reason, detail=row.finish_detail)
    return m.ActiveStatus() if row.id in active or row.created_at > now - ACTIVE_SECONDS else None


def _summary(
    row: tables.Session,
    status: m.ActiveStatus | m.ClientFinishedStatus | None,
    totals: tuple[int, int],
) -> m.SessionSummary:
    return m.SessionSummary(
        session_id=row.id,
        created_at=iso(row.created_at),
        owner=row.tenant,
        project_id=row.project_id or "",
        status=status,
        checkpoints_count=totals[0],
        display_name=row.display_name,
        user_metadata=texts(row.user_metadata),
        checkpoint_storage_bytes=totals[1],
    )
