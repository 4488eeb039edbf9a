"""Finds sessions by name, owner and status. Blocking.

A search reads at most `MOST_READ` rows, and metadata only if it is searched for, so its cost doesn't grow with what
a tenant has. If there is more to read, the reply's cursor says where to go on.
"""

from __future__ import annotations

import time
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import cast

from twinkle.protocol import messages as m
from twinkle.server.service.metadata import iso, texts
from twinkle.server.store import tables
from twinkle.server.store.database import Database
from twinkle.server.store.session_filter import FoundSession, SessionFilter

# A client not heard from for this long (the SDK sends a heartbeat every 10 s) no longer counts as active.
ACTIVE_SECONDS = 120.0

# How many of the rows found by the database a search reads.
MOST_READ = 2000
_PAGE = 200

Status = m.ActiveStatus | m.ClientFinishedStatus | None


def search(
    database: Database, tenant: str, query: m.SearchSessions, active: AbstractSet[str]
) -> m.SearchSessionsResponse:
    """A page of the tenant's sessions that fulfil all conditions.

    Args:
        active: the sessions heard from lately.
    """
    now = time.time()
    if query.owner.type == "user" and tenant not in (query.owner.owner_urns or []):
        return m.SearchSessionsResponse(sessions=[])
    cursor = query.cursor
    before = (cursor.last_created_at.timestamp(), cursor.last_session_id) if cursor else None
    found: list[FoundSession] = []
    read, is_end = 0, False
    while len(found) <= query.limit and read < MOST_READ and not is_end:
        page = database.find_sessions(tenant, _filter(query), _PAGE, before)
        found += _matching(database, tenant, page, query, active, now)
        read, is_end = read + len(page), len(page) < _PAGE
        before = (page[-1].created_at, page[-1].id) if page else before
    shown = found[: query.limit]
    if len(found) > len(shown):
        before, is_end = (shown[-1].created_at, shown[-1].id), False
    next_cursor = None
    if not is_end and before is not None:
        created = datetime.fromtimestamp(before[0], UTC)
        next_cursor = m.SearchCursor(last_created_at=created, last_session_id=before[1])
    ids = [row.id for row in shown]
    whole, totals = database.session_metadata(tenant, ids), database.checkpoint_totals(ids, now)
    return m.SearchSessionsResponse(
        sessions=[
            _summary(row, _status(row, active, now), totals.get(row.id, (0, 0)))
            for row in (whole[session_id] for session_id in ids if session_id in whole)
        ],
        next_cursor=next_cursor,
    )


def _filter(query: m.SearchSessions) -> SessionFilter:
    """The conditions that the database can check."""
    words = sorted(_words(query)) if query.display_name is not None else None
    kinds = None if query.statuses is None else {status.type for status in query.statuses}
    return SessionFilter(
        project_ids=query.project_ids,
        session_id=query.session_id,
        words=words,
        is_finished=None if kinds is None or len(kinds) != 1 else "client_finished" in kinds,
    )


def _matching(
    database: Database,
    tenant: str,
    page: list[FoundSession],
    query: m.SearchSessions,
    active: AbstractSet[str],
    now: float,
) -> list[FoundSession]:
    """The rows of a page that also fulfil what the database can't check."""
    words = _words(query)
    rows = [row for row in page if _matches(row, query, words, _status(row, active, now))]
    if not query.user_metadata or not rows:
        return rows
    whole = database.session_metadata(tenant, [row.id for row in rows])
    wanted = query.user_metadata.items()
    return [
        row
        for row in rows
        if row.id in whole and wanted <= (texts(whole[row.id].user_metadata) or {}).items()
    ]


def _words(query: m.SearchSessions) -> set[str]:
    return set((query.display_name or "").lower().split())


def _matches(row: FoundSession, query: m.SearchSessions, words: set[str], status: Status) -> bool:
    if query.statuses is not None and not any(_has_status(status, wanted) for wanted in query.statuses):
        return False
    name = (row.display_name or "").lower()
    named = query.display_name is not None and all(word in name for word in words)
    return named or row.id == query.session_id or query.display_name is query.session_id is None


def _has_status(status: Status, wanted: m.StatusQuery) -> bool:
    if status is None or status.type != wanted.type:
        return False
    if isinstance(status, m.ClientFinishedStatus) and wanted.reasons is not None:
        return status.reason.type in wanted.reasons
    return True


def _status(row: FoundSession | tables.Session, active: AbstractSet[str], now: float) -> Status:
    if row.finished_at is not None:
        reason = m.ClientFinish(type=cast(m.FinishReason, row.finish_reason or "success"))
        return m.ClientFinishedStatus(reason=reason, detail=row.finish_detail)
    return m.ActiveStatus() if row.id in active or row.created_at > now - ACTIVE_SECONDS else None


def _summary(row: tables.Session, status: Status, totals: tuple[int, int]) -> m.SessionSummary:
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
