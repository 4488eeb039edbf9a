"""What a tenant may know about itself: its key, its usage, what was done to its checkpoints. An admin sees all tenants
(`tables.EVERYBODY`). Nothing is made up: the server knows no prices, and no people. If the SDK insists on a name or
address, the tenant's id stands in for it.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.service.metadata import iso, texts
from twinkle.server.service.parts import Answer, Parts, reads
from twinkle.server.store import tables
from twinkle.server.store.database import Database
from twinkle.server.store.ledger import UsageKind

MAX_USAGE_DAYS = 14

# Prefixes of the names of a resource's events.
_RESOURCES = {
    "all": None,
    "checkpoints": "checkpoint_",
    "projects": "project_",
    "teams": "team_",
    "organizations": "organization_",
}


async def _api_key(_parts: Parts, tenant: str, _query: m.GetApiKey) -> m.ApiKeyInfo:
    """In open mode any key is accepted; the tenant tells one from another."""
    return m.ApiKeyInfo(
        key_id=int(tenant.removeprefix("t-")[:12] or "0", 16),
        name=tenant,
        note="this server accepts any key (open mode), and keeps none",
        details=m.KeyDetails(
            org_details=m.OrgDetails(name="twinkle"), user_details=m.UserDetails(email=tenant)
        ),
    )


async def _delete_api_key(_parts: Parts, _tenant: str, _query: m.DeleteApiKey) -> m.Acknowledged:
    raise InvalidRequest(
        "this server accepts any key (open mode) and keeps none, so there is none to revoke; forget it where it is "
        "stored"
    )


def _audit_log(database: Database, tenant: str, query: m.GetAuditLog) -> m.AuditLog:
    """One day, midnight to midnight UTC."""
    day = query.day or datetime.now(UTC).date()
    start = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    rows = database.audit(tenant, start, start + 86_400, _RESOURCES[query.event_type])
    return m.AuditLog(entries=[_entry(row, tenant) for row in rows])


def _entry(row: tables.Audit, asked_of: str) -> m.AuditEntry:
    details = {**row.details, "tenant": row.tenant} if asked_of == tables.EVERYBODY else row.details
    return m.AuditEntry(
        timestamp=iso(row.time),
        event=row.event,
        event_details=details,
        model_id=row.details.get("model_id"),
        tinker_path=row.details.get("tinker_path"),
        purpose=row.details.get("purpose"),
    )


def _usage(database: Database, tenant: str, query: m.GetUsage) -> m.Usage:
    """Tokens and checkpoints by hour.

    Raises:
        InvalidRequest: if the span is not in whole hours, or longer than 14 days.
    """
    start, end = query.starting_on, query.ending_before
    for field, moment in (("starting_on", start), ("ending_before", end)):
        if moment.timestamp() % 3600:
            raise InvalidRequest(f"{field}: {moment.isoformat()} is not on the hour (UTC)")
    if not timedelta(0) < end - start <= timedelta(days=MAX_USAGE_DAYS):
        raise InvalidRequest(
            f"ending_before: must be after starting_on, by at most {MAX_USAGE_DAYS} days; ask for several spans"
        )
    if start.timestamp() > time.time():
        raise InvalidRequest(f"starting_on: {start.isoformat()} is in the future")
    hours = int(start.timestamp()) // 3600, int(end.timestamp()) // 3600
    rows = database.usage(tenant, *hours)
    sessions = database.session_metadata(tenant, sorted({row.session_id for row in rows}))
    return m.Usage(
        data=[_event(row, sessions.get(row.session_id)) for row in rows],
        sessions={
            session_id: m.UsageSession(user_metadata=texts(row.user_metadata))
            for session_id, row in sessions.items()
        },
    )


def _event(row: tables.Usage, session: tables.Session | None) -> m.UsageEvent:
    return m.UsageEvent(
        bucket_start=iso(row.hour * 3600),
        bucket_end=iso((row.hour + 1) * 3600),
        base_model=plain_name(row.base_model),
        user_id=row.tenant,
        session_id=row.session_id,
        project_id=session.project_id if session else None,
        event_info=_info(row),
    )


def _info(row: tables.Usage) -> m.UsageInfo:
    kind: UsageKind = row.kind  # pyright: ignore[reportAssignmentType]
    if kind == "checkpoint":
        return m.UsageInfo(type=kind, count=row.count)
    return m.UsageInfo(type=kind, token_count=row.count, cached=False if kind == "sampling_prefill" else None)


def _storage(database: Database, tenant: str, query: m.GetStorageUsage) -> m.StorageUsage:
    totals = database.storage(tenant, time.time(), query.project_id)
    return m.StorageUsage(
        data=[
            m.StorageUsageItem(
                project_id=total.project_id,
                org_user_urn=total.tenant,
                checkpoint_count=total.count,
                size_bytes=total.size_bytes,
                size_gigabytes=total.size_bytes / 1e9,
            )
            for total in totals
        ]
    )


QUERIES: dict[type[m.Query[Any]], Answer] = {
    m.GetApiKey: _api_key,
    m.DeleteApiKey: _delete_api_key,
    m.GetAuditLog: reads(_audit_log),
    m.GetUsage: reads(_usage),
    m.GetStorageUsage: reads(_storage),
}
