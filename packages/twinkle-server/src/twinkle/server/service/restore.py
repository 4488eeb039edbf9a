"""Restores what an earlier process knew, before this one accepts any request."""

from __future__ import annotations

import asyncio
import logging

from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.operations import digest
from twinkle.server.backends.protocol import CUSTOM_LOSS, CustomLoss
from twinkle.server.engine.restore import Found, Restore
from twinkle.server.scheduling.records import Accepted
from twinkle.server.scheduling.runs import Run
from twinkle.server.service import validation
from twinkle.server.service.parts import Parts
from twinkle.server.store.retry import retry_while_unavailable

_DAMAGED = (
    "a part of what the server had written down of runs and requests was damaged on its disk, and this may have been "
    "in it: then it is lost"
)

log = logging.getLogger("twinkle.server")


async def restore(parts: Parts) -> None:
    """Read the journal and the snapshots, if runs outlive their process."""
    if parts.open_journal is None:
        return
    journal = await asyncio.to_thread(parts.open_journal)
    found = Found()
    read, found.is_damaged = await asyncio.to_thread(parts.compaction.read_earlier, journal)
    for _, record in read:
        found.add(record)
    # Other runs' snapshots are left over: those runs have ended.
    await retry_while_unavailable(lambda: parts.run_files.delete_all_but(set(found.runs)))

    async def loss_of(run: Run, request: m.ForwardBackwardRequest) -> CustomLoss | None:
        if request.loss_fn != CUSTOM_LOSS:
            return None
        await parts.losses.load(run.tenant, request)
        return parts.losses.of(run.session_id, request)

    runs = Restore(parts.live, parts.scheduler, parts.futures, parts.run_files)
    parts.engine.repeat(await runs.apply(found, loss_of))
    for segment, record in read:
        if isinstance(record, Accepted) and (run := parts.live.get(record.run_id)) is not None:
            run.note_logged(segment, record.seq_id)
    # Not before: what was read must not be written again.
    parts.run_log.open(journal)
    for lost in parts.live.lost.values():
        if lost.run_id not in found.lost:
            parts.run_log.lost(lost)
    if found.is_damaged:
        parts.futures.note = f"; {_DAMAGED}"
    await _restore_requests(parts, found)
    if found.runs:
        log.info("%d runs go on where they were", len(found.runs))


async def _restore_requests(parts: Parts, found: Found) -> None:
    """Restore accepted requests that no run computes again by itself."""
    for record in found.accepted.values():
        is_unnamed = record.kind is m.SaveWeightsForSamplerRequest
        if is_unnamed and record.run_id is not None and parts.futures.is_pending(record.request_id):
            parts.checkpoints.expect_unnamed(record.run_id, record.seq_id)
    for record in found.accepted.values():
        if record.run_id is None:
            await _put_back(parts, record, found.outcomes.get(record.request_id))


async def _put_back(parts: Parts, record: Accepted, outcome: Encoded | None) -> None:
    """Restore a request on no run: a sample is drawn unless it has been; a loss is stored once more."""
    request = record.request()
    if outcome is None:
        session_id = ""
        if isinstance(request, m.SampleRequest):
            session_id = request.sampling_session_id.rpartition(":sample:")[0]
        elif isinstance(request, m.CreateCustomLossRequest):
            session_id = request.session_id
        parts.futures.create(record.request_id, record.tenant, session_id, tokens=record.tokens)
    try:
        if isinstance(request, m.SampleRequest):
            await _put_back_sample(parts, record, request, outcome)
        elif isinstance(request, m.CreateCustomLossRequest) and outcome is None:
            loss_id = await parts.losses.create(record.tenant, request, parts.worker.loss_fns)
            parts.futures.restore(record.request_id, m.CreateCustomLossResponse(loss_id=loss_id))
    except TwinkleError as error:
        if outcome is None:
            failure = m.Failure(error=error.message, category=error.category)
            parts.futures.restore(record.request_id, failure)


async def _put_back_sample(
    parts: Parts, record: Accepted, request: m.SampleRequest, outcome: Encoded | None
) -> None:
    sampler = await parts.samplers.find(record.tenant, request.sampling_session_id)
    parts.leases.expect(sampler.session_id)
    if outcome is not None:
        parts.samples.restore(sampler, request, record.request_id, digest(request), outcome)
        return
    validation.check_sample(request, parts.worker.info)  # this model may have lower limits
    targets = validation.target_tokens(request, parts.worker.info)
    parts.samples.begin(sampler, request, record.request_id, digest(request), targets)
