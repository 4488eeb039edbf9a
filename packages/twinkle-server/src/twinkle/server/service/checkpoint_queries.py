"""Queries about saved checkpoints, and changes to them, which are recorded in the audit log."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeAlias

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.service import sessions, validation
from twinkle.server.service.parts import Answer, Parts
from twinkle.server.service.session_queries import create as create_session
from twinkle.server.store import tables

_OneCheckpoint: TypeAlias = (
    m.DeleteCheckpoint
    | m.PublishCheckpoint
    | m.UnpublishCheckpoint
    | m.SetCheckpointTtl
    | m.GetCheckpointUrls
    | m.GetCheckpointArchive
)


async def _weights_info(parts: Parts, tenant: str, query: m.WeightsInfoRequest) -> m.WeightsInfo:
    row = await parts.checkpoints.find(tenant, query.tinker_path, "tinker_path")
    return m.WeightsInfo(
        base_model=plain_name(row.base_model),
        lora_rank=row.rank,
        train_unembed=row.train_unembed,
        train_mlp=row.train_mlp,
        train_attn=row.train_attn,
    )


async def _delete(parts: Parts, tenant: str, query: m.DeleteCheckpoint) -> m.Acknowledged:
    row = await parts.checkpoints.find_own(tenant, _uri_of(query))
    await parts.checkpoints.check_reachable(row)
    await parts.checkpoints.delete(row)
    await parts.checkpoints.audit(tenant, "checkpoint_delete", row.uri)
    return m.Acknowledged()


async def _publish(
    parts: Parts, tenant: str, query: m.PublishCheckpoint | m.UnpublishCheckpoint
) -> m.Acknowledged:
    is_public = isinstance(query, m.PublishCheckpoint)
    row = await parts.checkpoints.find_own(tenant, _uri_of(query))
    await asyncio.to_thread(parts.database.set_public, tenant, row.uri, is_public)
    event = "checkpoint_publish" if is_public else "checkpoint_unpublish"
    await parts.checkpoints.audit(tenant, event, row.uri)
    return m.Acknowledged()


async def _set_ttl(parts: Parts, tenant: str, query: m.SetCheckpointTtl) -> m.Acknowledged:
    row = await parts.checkpoints.find_own(tenant, _uri_of(query))
    validation.check_ttl(query.ttl_seconds, parts.limits.max_checkpoint_ttl_seconds)
    expires_at = parts.checkpoints.expiry(query.ttl_seconds, time.time())
    await asyncio.to_thread(parts.database.set_expiry, tenant, row.uri, expires_at)
    await parts.checkpoints.audit(tenant, "checkpoint_ttl_set", row.uri, ttl_seconds=query.ttl_seconds)
    return m.Acknowledged()


async def _urls(
    parts: Parts, tenant: str, query: m.GetCheckpointUrls | m.GetCheckpointArchive
) -> m.ExternalWeightsUrls:
    row = await parts.checkpoints.find(tenant, str(_uri_of(query)))
    is_archive = isinstance(query, m.GetCheckpointArchive)
    make = parts.downloads.archive if is_archive else parts.downloads.checkpoint
    reply = await asyncio.to_thread(make, tenant, row)
    await parts.checkpoints.audit(tenant, "checkpoint_read", row.uri, purpose="download")
    return reply


# ---------------------------------------------------------------- copies


async def _copy(parts: Parts, tenant: str, request: m.CopyWeightsRequest) -> m.CopyWeightsResponse:
    source = await parts.checkpoints.find(
        tenant, request.source_path, "source_path", request.weights_access_token
    )
    session_id, number = await _destination(parts, tenant, request, source)
    run_id = f"{session_id}:train:{number}"
    copied = CheckpointUri(source.name, run_id, source.uri.kind)
    if await asyncio.to_thread(parts.database.run, tenant, run_id, time.time()) is not None:
        if await asyncio.to_thread(parts.database.checkpoint, tenant, copied, time.time()) is not None:
            return m.CopyWeightsResponse(tinker_path=str(copied))  # a duplicate request
        raise InvalidRequest(f"model_seq_id: {number} is taken by another run of this session")
    validation.check_ttl(request.ttl_seconds, parts.limits.max_checkpoint_ttl_seconds)
    run = _run_of_copy(run_id, tenant, session_id, source)
    expires_at = parts.checkpoints.expiry(request.ttl_seconds, time.time())
    row = await parts.checkpoints.copy(source, run, expires_at)
    await parts.checkpoints.audit(tenant, "checkpoint_read", source.uri, purpose="copy")
    await parts.checkpoints.audit(tenant, "checkpoint_create", row.uri, source=str(source.uri))
    return m.CopyWeightsResponse(tinker_path=str(row.uri))


async def _destination(
    parts: Parts, tenant: str, request: m.CopyWeightsRequest, source: tables.Checkpoint
) -> tuple[str, int]:
    """Session and number of the run that the copy is placed under."""
    if request.session_id is None:
        session = m.CreateSessionRequest(
            project_id=request.destination_project_id,
            display_name=f"copy of {source.name}",
            idempotency_key=request.idempotency_key,
        )
        return (await create_session(parts, tenant, session)).session_id, 0
    if request.model_seq_id is None:
        raise InvalidRequest("model_seq_id: missing; number the runs of a session 0, 1, 2, ...")
    await sessions.find_open(parts.database, tenant, request.session_id)
    return request.session_id, request.model_seq_id


def _uri_of(query: _OneCheckpoint) -> CheckpointUri:
    """
    Raises:
        InvalidRequest: if the path names no checkpoint.
    """
    return uris.parse(str(CheckpointUri(query.name, query.run_id, query.kind)))


def _run_of_copy(run_id: str, tenant: str, session_id: str, source: tables.Checkpoint) -> tables.Run:
    now = time.time()
    return tables.Run(
        id=run_id,
        tenant=tenant,
        session_id=session_id,
        base_model=source.base_model,
        created_at=now,
        last_request_at=now,
        rank=source.rank,
        user_metadata=source.user_metadata,
    )


QUERIES: dict[type[m.Query[Any]], Answer] = {
    m.WeightsInfoRequest: _weights_info,
    m.CopyWeightsRequest: _copy,
    m.DeleteCheckpoint: _delete,
    m.PublishCheckpoint: _publish,
    m.UnpublishCheckpoint: _publish,
    m.SetCheckpointTtl: _set_ttl,
    m.GetCheckpointUrls: _urls,
    m.GetCheckpointArchive: _urls,
}
