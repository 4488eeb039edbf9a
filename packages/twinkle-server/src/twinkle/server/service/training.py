"""Operations on training runs: accepted here, in order, and computed by the engine."""

from __future__ import annotations

import asyncio
import secrets
import time

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Conflict, InvalidRequest
from twinkle.protocol.types import LoraConfig
from twinkle.server.backends.protocol import CUSTOM_LOSS, DEFAULT_ALPHA, AdapterSpec
from twinkle.server.scheduling.limits import check_runs, check_submission
from twinkle.server.scheduling.runs import Received, Run
from twinkle.server.service import sessions, validation
from twinkle.server.service.parts import Parts, Submit
from twinkle.server.store import tables

DEFAULT_RANK = 32


async def submit_ordered(parts: Parts, tenant: str, request: m.Ordered, received: Received) -> m.Promise:
    """Queue a request in its run's order, by `seq_id`."""
    is_pass = isinstance(request, m.ForwardBackwardRequest)
    if is_pass and request.loss_fn == CUSTOM_LOSS:
        await parts.losses.load(tenant, request)
    # No await from here on: what is checked still holds when the request is queued.
    run = parts.live.find(tenant, request.model_id)
    parts.ledger.touch(run.run_id)
    parts.leases.renew(run.session_id)
    seq_id = request.seq_id
    if seq_id is None:
        raise InvalidRequest("seq_id: missing; number the requests of a run 1, 2, 3, ...")
    queue = run.queue
    if (first := queue.duplicate_of(seq_id, received)) is not None:
        return m.Promise(request_id=first, model_id=run.run_id)
    # The run's later requests wait for its next one, so that is always accepted.
    is_next = queue.check(seq_id)
    loss, tokens = None, 0
    try:
        if is_pass:
            if request.loss_fn == CUSTOM_LOSS:
                loss = parts.losses.of(run.session_id, request)
            tokens = validation.check_pass(request, parts.worker.info, parts.worker.loss_fns, loss)
        else:
            if isinstance(request, m.SaveWeightsForSamplerRequest) and request.path is None:
                validation.check_samples(parts.worker)
            validation.check_on_run(
                request, parts.limits.max_checkpoint_ttl_seconds, parts.limits.max_metadata_bytes
            )
    except InvalidRequest:
        parts.live.reject(run, seq_id)
        raise
    own, in_all = parts.futures.load_of(tenant), parts.futures.load
    check_submission(parts.limits, own, in_all, parts.tokens, tenant, tokens, always_room=is_next)
    return parts.live.enqueue(run, seq_id, received, tokens, loss)


async def _unload(parts: Parts, tenant: str, request: m.UnloadModelRequest, received: Received) -> m.Promise:
    run = parts.live.find(tenant, request.model_id)
    if request.seq_id is None:
        return parts.live.enqueue_last(run, request)
    queue = run.queue
    if (first := queue.duplicate_of(request.seq_id, received)) is not None:
        return m.Promise(request_id=first, model_id=run.run_id)
    queue.check(request.seq_id)
    return parts.live.enqueue(run, request.seq_id, received)


async def _load(parts: Parts, tenant: str, request: m.LoadWeightsRequest, received: Received) -> m.Promise:
    """Into a run, or into a new one."""
    if request.model_id is not None:
        return await submit_ordered(parts, tenant, request, received)
    if request.session_id is None or request.model_seq_id is None:
        raise InvalidRequest("model_id: missing; name a run, or session_id and model_seq_id for a new one")
    validation.check_optimizer(request.optimizer_config, "optimizer_config.type")
    checkpoint = await parts.checkpoints.find(tenant, request.path, token=request.weights_access_token)
    await parts.checkpoints.audit(tenant, "checkpoint_read", checkpoint.uri, purpose="load")
    validation.check_base_model(checkpoint.base_model, parts.model_name, "path: the checkpoint's base model")
    # Rank and alpha are from the files, not from the row, which somebody may have edited.
    spec = (await parts.checkpoints.read(checkpoint.uri)).spec
    return await _begin_run(parts, tenant, request.session_id, request.model_seq_id, spec, request, received)


# ---------------------------------------------------------------- new runs


async def _create_run(
    parts: Parts, tenant: str, request: m.CreateModelRequest, received: Received
) -> m.Promise:
    validation.check_base_model(request.base_model, parts.model_name)
    config = request.lora_config or LoraConfig(rank=DEFAULT_RANK)
    validation.check_lora_config(config, parts.worker.info)
    validation.check_optimizer(request.optimizer_config, "optimizer_config.type")
    spec = AdapterSpec(
        rank=config.rank,
        alpha=config.alpha if config.alpha is not None else DEFAULT_ALPHA,
        seed=config.seed if config.seed is not None else secrets.randbits(63),
        **validation.trainable_flags(config, parts.worker.info),
    )
    return await _begin_run(parts, tenant, request.session_id, request.model_seq_id, spec, request, received)


async def _begin_run(
    parts: Parts,
    tenant: str,
    session_id: str,
    model_seq_id: int,
    spec: AdapterSpec,
    request: m.CreateModelRequest | m.LoadWeightsRequest,
    received: Received,
) -> m.Promise:
    validation.check_metadata(request.user_metadata, parts.limits.max_metadata_bytes)
    await sessions.find_open(parts.database, tenant, session_id)
    run_id = f"{session_id}:train:{model_seq_id}"
    parts.live.check_not_lost(tenant, run_id)
    parts.leases.renew(session_id)
    now = time.time()
    row = tables.Run(
        id=run_id,
        tenant=tenant,
        session_id=session_id,
        base_model=parts.model_name,
        created_at=now,
        last_request_at=now,
        rank=spec.rank,
        user_metadata=request.user_metadata,
    )
    if run_id not in parts.live:
        own, in_all = parts.futures.load_of(tenant), parts.futures.load
        check_submission(parts.limits, own, in_all, parts.tokens, tenant, 0)
        check_runs(parts.limits, [other.tenant for other in parts.live], tenant)
        await asyncio.to_thread(parts.database.put, row)
    if (
        first := parts.live.get(run_id)
    ) is not None:  # a duplicate, or one that arrived while the row was written
        return m.Promise(request_id=_first_of_run(first, request.model_seq_id, received), model_id=run_id)
    return parts.live.begin(Run(run_id, tenant, session_id, parts.model_name, spec), received)


def _first_of_run(run: Run, model_seq_id: int | None, received: Received) -> str:
    """
    Raises:
        Conflict: if the run was begun by a request with other content.
        InvalidRequest: if that was of another kind, or so long ago that it is no longer known.
    """
    try:
        first = run.queue.duplicate_of(0, received)
    except Conflict as error:
        raise Conflict(
            f"model_seq_id: {model_seq_id} was used before in this session, for a run that is something "
            "else: a request that is sent again must be the same, and another run needs the next number"
        ) from error
    if first is None:
        raise InvalidRequest(
            f"model_seq_id: {model_seq_id} was used before in this session, for run {run.run_id}, which takes "
            "requests; another run needs the next number"
        )
    return first


async def _create_custom_loss(
    parts: Parts, tenant: str, request: m.CreateCustomLossRequest, received: Received
) -> m.Promise:
    await sessions.find_open(parts.database, tenant, request.session_id)
    loss_id = await parts.losses.create(tenant, request, parts.worker.loss_fns)
    request_id = parts.run_log.accepted(tenant, None, request.custom_loss_seq_id, received)
    parts.futures.create(request_id, tenant, request.session_id)
    parts.futures.complete(request_id, m.CreateCustomLossResponse(loss_id=loss_id))
    return m.Promise(request_id=request_id)


OPERATIONS: dict[type[m.Operation], Submit] = {
    m.CreateModelRequest: _create_run,
    m.LoadWeightsRequest: _load,
    m.UnloadModelRequest: _unload,
    m.ForwardBackwardRequest: submit_ordered,
    m.OptimStepRequest: submit_ordered,
    m.SaveWeightsRequest: submit_ordered,
    m.SaveWeightsForSamplerRequest: submit_ordered,
    m.SaveWeightsExternalRequest: submit_ordered,
    m.CreateCustomLossRequest: _create_custom_loss,
}
