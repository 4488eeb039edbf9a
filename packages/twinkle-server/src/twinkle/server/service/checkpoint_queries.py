"""What can be asked of, and done to, checkpoints that are saved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.config import LimitsSection
from twinkle.server.service import sessions, validation
from twinkle.server.service.downloads import Downloads
from twinkle.server.store import tables
from twinkle.server.store.database import Database

_OneCheckpoint: TypeAlias = (
    m.DeleteCheckpoint
    | m.PublishCheckpoint
    | m.UnpublishCheckpoint
    | m.SetCheckpointTtl
    | m.GetCheckpointUrls
    | m.GetCheckpointArchive
)

CheckpointQuery: TypeAlias = _OneCheckpoint | m.WeightsInfoRequest | m.CopyWeightsRequest


class CheckpointDesk:
    """Answers queries about checkpoints, and notes what was done in the audit log."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        database: Database,
        downloads: Downloads,
        limits: LimitsSection,
        create_session: Callable[[str, m.CreateSessionRequest], Awaitable[m.CreateSessionResponse]],
    ) -> None:
        self._create_session = create_session
        self._longest_ttl = limits.max_checkpoint_ttl_seconds
        self._checkpoints = checkpoints
        self._database = database
        self._downloads = downloads

    async def answer(self, tenant: str, query: CheckpointQuery) -> m.Reply:
        """
        Raises:
            InvalidRequest, NotFound: as fits.
        """
        match query:
            case m.WeightsInfoRequest():
                return _weights_info(await self._checkpoints.find(tenant, query.tinker_path, "tinker_path"))
            case m.CopyWeightsRequest():
                return await self._copy(tenant, query)
            case m.GetCheckpointUrls() | m.GetCheckpointArchive():
                return await self._addresses(tenant, query)
            case (
                m.DeleteCheckpoint() | m.PublishCheckpoint() | m.UnpublishCheckpoint() | m.SetCheckpointTtl()
            ):
                await self._change(await self._checkpoints.find_own(tenant, _uri_of(query)), query)
                return m.Acknowledged()

    async def _change(
        self,
        row: tables.Checkpoint,
        query: m.DeleteCheckpoint | m.PublishCheckpoint | m.UnpublishCheckpoint | m.SetCheckpointTtl,
    ) -> None:
        more: dict[str, object] = {}
        match query:
            case m.DeleteCheckpoint():
                event = "checkpoint_delete"
                await self._checkpoints.delete(row)
            case m.PublishCheckpoint():
                event = "checkpoint_publish"
                await asyncio.to_thread(self._database.set_public, row.tenant, row.uri, True)
            case m.UnpublishCheckpoint():
                event = "checkpoint_unpublish"
                await asyncio.to_thread(self._database.set_public, row.tenant, row.uri, False)
            case m.SetCheckpointTtl():
                event = "checkpoint_ttl_set"
                more = {"ttl_seconds": query.ttl_seconds}
                validation.check_ttl(query.ttl_seconds, self._longest_ttl)
                expires_at = self._checkpoints.expiry(query.ttl_seconds, time.time())
                await asyncio.to_thread(self._database.set_expiry, row.tenant, row.uri, expires_at)
        await self._checkpoints.audit(row.tenant, event, row.uri, **more)

    async def _addresses(
        self, tenant: str, query: m.GetCheckpointUrls | m.GetCheckpointArchive
    ) -> m.ExternalWeightsUrls:
        row = await self._checkpoints.find(tenant, str(_uri_of(query)))
        make = (
            self._downloads.checkpoint if isinstance(query, m.GetCheckpointUrls) else self._downloads.archive
        )
        reply = await asyncio.to_thread(make, tenant, row)
        await self._checkpoints.audit(tenant, "checkpoint_read", row.uri, purpose="download")
        return reply

    # ------------------------------------------------------------ copies

    async def _copy(self, tenant: str, request: m.CopyWeightsRequest) -> m.CopyWeightsResponse:
        source = await self._checkpoints.find(
            tenant, request.source_path, "source_path", request.weights_access_token
        )
        session_id, number = await self._destination(tenant, request, source)
        run_id = f"{session_id}:train:{number}"
        copied = CheckpointUri(source.name, run_id, source.uri.kind)
        if await asyncio.to_thread(self._database.run, tenant, run_id, time.time()) is not None:
            if await asyncio.to_thread(self._database.checkpoint, tenant, copied, time.time()) is not None:
                return m.CopyWeightsResponse(tinker_path=str(copied))  # the same request once more
            raise InvalidRequest(f"model_seq_id: {number} is taken by another run of this session")
        validation.check_ttl(request.ttl_seconds, self._longest_ttl)
        run = _run_of_copy(run_id, tenant, session_id, source)
        row = await self._checkpoints.copy(
            source, run, self._checkpoints.expiry(request.ttl_seconds, time.time())
        )
        await self._checkpoints.audit(tenant, "checkpoint_read", source.uri, purpose="copy")
        await self._checkpoints.audit(tenant, "checkpoint_create", row.uri, source=str(source.uri))
        return m.CopyWeightsResponse(tinker_path=str(row.uri))

    async def _destination(
        self, tenant: str, request: m.CopyWeightsRequest, source: tables.Checkpoint
    ) -> tuple[str, int]:
        """Session and number of the run that the copy is put under."""
        if request.session_id is None:
            session = m.CreateSessionRequest(
                project_id=request.destination_project_id,
                display_name=f"copy of {source.name}",
                idempotency_key=request.idempotency_key,
            )
            return (await self._create_session(tenant, session)).session_id, 0
        if request.model_seq_id is None:
            raise InvalidRequest("model_seq_id: missing; number the runs of a session 0, 1, 2, ...")
        await sessions.find_open(self._database, tenant, request.session_id)
        return request.session_id, request.model_seq_id


def _uri_of(query: _OneCheckpoint) -> CheckpointUri:
    """
    Raises:
        InvalidRequest: if the path names no checkpoint.
    """
    return uris.parse(str(CheckpointUri(query.name, query.run_id, query.kind)))


def _weights_info(row: tables.Checkpoint) -> m.WeightsInfo:
    return m.WeightsInfo(
        base_model=plain_name(row.base_model),
        lora_rank=row.rank,
        train_unembed=row.train_unembed,
        train_mlp=row.train_mlp,
        train_attn=row.train_attn,
    )


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
