"""Sampling sessions: a base model or a checkpoint on it, and the clients that sample from it."""

from __future__ import annotations

import asyncio
import time

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import Conflict, InvalidRequest, NotFound
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.service import sessions, validation
from twinkle.server.store import tables
from twinkle.server.store.database import Database

# A poll for many samples at once is answered after so long at the latest.
LONG_POLL_SECONDS = 25.0


class Samplers:
    """The store's sampling sessions, those in use at hand. Single-threaded: called on one event loop."""

    def __init__(
        self, model_name: str, database: Database, checkpoints: Checkpoints, completions: CompletionLog
    ) -> None:
        self._model_name = model_name
        self._database = database
        self._checkpoints = checkpoints
        self._completions = completions
        self._known: dict[
            str, tables.Sampler
        ] = {}  # rows that were looked up; what is read of them never changes

    async def create(
        self, tenant: str, request: m.CreateSamplingSessionRequest
    ) -> m.CreateSamplingSessionResponse:
        """
        Raises:
            InvalidRequest, NotFound: if the base model or the checkpoint isn't there.
            Conflict: if the number was used for another.
        """
        await sessions.find_open(self._database, tenant, request.session_id)
        if request.base_model is not None:
            validation.check_base_model(request.base_model, self._model_name)
        if request.base_model is None and request.model_path is None:
            raise InvalidRequest(
                "base_model: missing; give a base model, or the path of a checkpoint as model_path"
            )
        checkpoint: tables.Checkpoint | None = None
        if request.model_path is not None:
            checkpoint = await self._checkpoints.find(tenant, request.model_path, "model_path")
            validation.check_base_model(
                checkpoint.base_model, self._model_name, "model_path: the checkpoint's base model"
            )
            await self._checkpoints.audit(tenant, "checkpoint_read", checkpoint.uri, purpose="sample")
        sampler_id = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
        first = await asyncio.to_thread(self._database.sampler, tenant, sampler_id)
        path = str(checkpoint.uri) if checkpoint else None
        is_bare = request.model_path is not None and uris.parse(request.model_path).run_id is None
        if (
            first is not None and first.model_path != path and not is_bare
        ):  # a bare name's newest may be another by now
            raise Conflict(
                f"sampling_session_seq_id: {request.sampling_session_seq_id} was used before in this session, for "
                f"{first.model_path or 'the base model'}; another sampling session needs the next number"
            )
        if first is None:
            row = tables.Sampler(
                id=sampler_id,
                tenant=tenant,
                session_id=request.session_id,
                base_model=self._model_name,
                model_path=path,
                checkpoint_time=checkpoint.created_at if checkpoint else None,
                created_at=time.time(),
                clients=0,
            )
            await asyncio.to_thread(self._database.put, row)
        return m.CreateSamplingSessionResponse(sampling_session_id=sampler_id)

    async def find(self, tenant: str, sampler_id: str) -> tables.Sampler:
        """
        Raises:
            NotFound: if there is no such sampling session of the tenant's.
        """
        sampler = self._known.get(sampler_id)
        if sampler is None or sampler.tenant != tenant:
            sampler = await asyncio.to_thread(self._database.sampler, tenant, sampler_id)
            if sampler is None:
                raise NotFound(
                    f"sampling_session_id: no sampling session {sampler_id[:200]!r}; make one with "
                    "create_sampling_client"
                )
            self._known[sampler.id] = sampler
        return sampler

    async def join(self, tenant: str, request: m.JoinSamplingSessionRequest) -> m.JoinSamplingSessionResponse:
        """One more client of a sampling session."""
        sampler = await self.find(tenant, request.sampling_session_id)
        number = await asyncio.to_thread(self._database.join_sampler, tenant, sampler.id)
        assert number is not None, "the sampler has just been found"
        return m.JoinSamplingSessionResponse(client_counter=number)

    async def ended_samples(
        self, tenant: str, request: m.RetrieveFuturesRequest
    ) -> m.RetrieveFuturesResponse:
        """What has ended since the client last asked, as soon as there is something."""
        sampler = await self.find(tenant, request.target.sampling_session_id)
        wanted = LONG_POLL_SECONDS if request.timeout is None else request.timeout
        target = (sampler.id, request.target.cloned_sampler_id)
        return await self._completions.after(target, request.prev_cursor, min(wanted, LONG_POLL_SECONDS))

    def forget(self, session_id: str) -> None:
        """The session is over."""
        for sampler_id in [s.id for s in self._known.values() if s.session_id == session_id]:
            del self._known[sampler_id]
            self._completions.forget(sampler_id)
