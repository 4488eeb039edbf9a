"""Queries about sessions, and their heartbeats."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from twinkle.protocol import messages as m
from twinkle.server.service import session_search, sessions
from twinkle.server.service.parts import Answer, Parts, reads
from twinkle.server.service.session_expiry import end_session
from twinkle.server.store import tables

# Limit on what a client says about the end of its session; the rest is cut off.
_MAX_DETAIL = 4096


async def create(parts: Parts, tenant: str, request: m.CreateSessionRequest) -> m.CreateSessionResponse:
    """
    Raises:
        InvalidRequest: if its metadata is too long.
        QuotaReached: if there would be too many sessions.
    """
    in_use = parts.leases.sessions()
    return await asyncio.to_thread(sessions.create, parts.database, tenant, request, parts.limits, in_use)


async def _create_and_lease(
    parts: Parts, tenant: str, request: m.CreateSessionRequest
) -> m.CreateSessionResponse:
    reply = await create(parts, tenant, request)
    parts.leases.renew(reply.session_id)
    return reply


async def _heartbeat(
    parts: Parts, tenant: str, request: m.SessionHeartbeatRequest
) -> m.SessionHeartbeatResponse:
    row = await sessions.find_open(parts.database, tenant, request.session_id)
    parts.leases.renew(row.id, heartbeat=True)
    return m.SessionHeartbeatResponse()


async def _finish(parts: Parts, tenant: str, request: m.FinishSessionRequest) -> m.Acknowledged:
    session = await sessions.find(parts.database, tenant, request.session_id)
    # The client that ends it is alive, but its lease is about to go, and paused samples would stay paused.
    await asyncio.to_thread(
        parts.database.finish_session,
        tenant,
        session.id,
        time.time(),
        request.reason.type,
        request.detail and request.detail[:_MAX_DETAIL],
    )
    await end_session(parts, session.id)
    return m.Acknowledged()


async def _search(parts: Parts, tenant: str, query: m.SearchSessions) -> m.SearchSessionsResponse:
    active = parts.leases.active(session_search.ACTIVE_SECONDS)
    return await parts.threads.queries.run(
        tenant, lambda: session_search.search(parts.database, tenant, query, active)
    )


async def _assign_project(parts: Parts, tenant: str, query: m.AssignSessionProject) -> m.Acknowledged:
    row = await sessions.find(parts.database, tenant, query.session_id)
    await asyncio.to_thread(parts.database.set_project, tenant, row.id, query.project_id)
    details = {"session_id": row.id, "project_id": query.project_id}
    entry = tables.Audit(tenant=tenant, time=time.time(), event="project_session_assign", details=details)
    await asyncio.to_thread(parts.database.put, entry)
    return m.Acknowledged()


async def _export_trace(parts: Parts, tenant: str, query: m.ExportTrace) -> m.TraceExport:
    await sessions.find(parts.database, tenant, query.session_id)
    return m.TraceExport(status="failed", error="this server records no traces of sessions")


QUERIES: dict[type[m.Query[Any]], Answer] = {
    m.CreateSessionRequest: _create_and_lease,
    m.SessionHeartbeatRequest: _heartbeat,
    m.FinishSessionRequest: _finish,
    m.ListSessions: reads(sessions.listed),
    m.GetSession: reads(sessions.info),
    m.SearchSessions: _search,
    m.AssignSessionProject: _assign_project,
    m.ExportTrace: _export_trace,
}
