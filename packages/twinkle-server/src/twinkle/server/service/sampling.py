"""Sampling sessions (a base model or a checkpoint on it, and its clients), and the samples drawn in them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import Conflict, InvalidRequest, NotFound
from twinkle.server.scheduling.limits import check_submission
from twinkle.server.scheduling.runs import Received
from twinkle.server.service import sessions, validation
from twinkle.server.service.parts import Answer, Parts, Submit, reads
from twinkle.server.store import tables
from twinkle.server.store.database import Database

# A poll for many samples is answered after this long at the latest.
LONG_POLL_SECONDS = 25.0


async def submit_sample(parts: Parts, tenant: str, request: m.SampleRequest, received: Received) -> m.Promise:
    """
    Raises:
        InvalidRequest, NotFound: if it can't be drawn.
        Conflict: if its number was used for another sample.
        LimitReached, Unavailable: if it can't be accepted now.
    """
    sampler = await parts.samplers.find(tenant, request.sampling_session_id)
    validation.check_samples(parts.worker)
    parts.leases.renew(sampler.session_id)
    validation.check_sample(request, parts.worker.info)
    targets = validation.target_tokens(request, parts.worker.info)
    if (first := parts.samples.first_of(request, received.digest)) is not None:
        return first
    tokens = len(request.prompt.tokens)
    own, in_all = parts.futures.load_of(tenant), parts.futures.load
    check_submission(parts.limits, own, in_all, parts.tokens, tenant, tokens)
    request_id = parts.run_log.accepted(tenant, None, request.seq_id, received)
    parts.tokens.charge(tenant, tokens)
    parts.futures.create(request_id, tenant, sampler.session_id, tokens=tokens)
    return parts.samples.begin(sampler, request, request_id, received.digest, targets)


OPERATIONS: dict[type[m.Operation], Submit] = {m.SampleRequest: submit_sample}


# ---------------------------------------------------------------- sampling sessions


async def _create(
    parts: Parts, tenant: str, request: m.CreateSamplingSessionRequest
) -> m.CreateSamplingSessionResponse:
    """
    Raises:
        InvalidRequest, NotFound: if the base model or the checkpoint isn't there.
        Conflict: if the number was used for another.
    """
    await sessions.find_open(parts.database, tenant, request.session_id)
    validation.check_samples(parts.worker)
    if request.base_model is not None:
        validation.check_base_model(request.base_model, parts.model_name)
    if request.base_model is None and request.model_path is None:
        raise InvalidRequest(
            "base_model: missing; give a base model, or the path of a checkpoint as model_path"
        )
    checkpoint: tables.Checkpoint | None = None
    if request.model_path is not None:
        checkpoint = await parts.checkpoints.find(tenant, request.model_path, "model_path")
        validation.check_base_model(
            checkpoint.base_model, parts.model_name, "model_path: the checkpoint's base model"
        )
        await parts.checkpoints.audit(tenant, "checkpoint_read", checkpoint.uri, purpose="sample")
    sampler_id = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
    first = await asyncio.to_thread(parts.database.sampler, tenant, sampler_id)
    path = str(checkpoint.uri) if checkpoint else None
    # A bare name's newest checkpoint may be a different one by now.
    is_bare = request.model_path is not None and uris.parse(request.model_path).run_id is None
    if first is not None and first.model_path != path and not is_bare:
        raise Conflict(
            f"sampling_session_seq_id: {request.sampling_session_seq_id} was used before in this session, for "
            f"{first.model_path or 'the base model'}; another sampling session needs the next number"
        )
    if first is None:
        row = tables.SamplingSession(
            id=sampler_id,
            tenant=tenant,
            session_id=request.session_id,
            base_model=parts.model_name,
            model_path=path,
            checkpoint_time=checkpoint.created_at if checkpoint else None,
            created_at=time.time(),
            clients=0,
        )
        await asyncio.to_thread(parts.database.put, row)
    return m.CreateSamplingSessionResponse(sampling_session_id=sampler_id)


async def _join(
    parts: Parts, tenant: str, request: m.JoinSamplingSessionRequest
) -> m.JoinSamplingSessionResponse:
    """Add a client to a sampling session."""
    sampler = await parts.samplers.find(tenant, request.sampling_session_id)
    number = await asyncio.to_thread(parts.database.join_sampler, tenant, sampler.id)
    assert number is not None, "the sampler has just been found"
    return m.JoinSamplingSessionResponse(client_counter=number)


def _info(database: Database, tenant: str, query: m.GetSampler) -> m.SamplerInfo:
    sampler = database.sampler(tenant, query.sampler_id)
    if sampler is None:
        raise NotFound(f"sampler_id: no sampler {query.sampler_id[:200]!r}")
    return m.SamplerInfo(
        sampler_id=sampler.id, base_model=plain_name(sampler.base_model), model_path=sampler.model_path
    )


async def _ended_samples(
    parts: Parts, tenant: str, request: m.RetrieveFuturesRequest
) -> m.RetrieveFuturesResponse:
    """What has ended since the client last asked, as soon as there is anything."""
    sampler = await parts.samplers.find(tenant, request.target.sampling_session_id)
    wanted = LONG_POLL_SECONDS if request.timeout is None else request.timeout
    target = (sampler.id, request.target.cloned_sampler_id)
    with parts.leases.waiting([sampler.session_id]):
        return await parts.completions.after(target, request.prev_cursor, min(wanted, LONG_POLL_SECONDS))


async def _cancel(parts: Parts, tenant: str, request: m.CancelFutureRequest) -> m.Acknowledged:
    parts.samples.cancel(tenant, request.request_id)
    return m.Acknowledged()


QUERIES: dict[type[m.Query[Any]], Answer] = {
    m.CreateSamplingSessionRequest: _create,
    m.JoinSamplingSessionRequest: _join,
    m.GetSampler: reads(_info),
    m.RetrieveFuturesRequest: _ended_samples,
    m.CancelFutureRequest: _cancel,
}
