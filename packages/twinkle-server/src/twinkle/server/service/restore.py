"""Restores what an earlier process knew, before this one accepts a request; takes over what another engine knew."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.operations import digest
from twinkle.server.backends.protocol import CUSTOM_LOSS, CustomLoss
from twinkle.server.engine.restore import Found, Restore
from twinkle.server.scheduling import records
from twinkle.server.scheduling.records import Accepted, Record
from twinkle.server.scheduling.runs import Run
from twinkle.server.service import validation
from twinkle.server.service.parts import Parts
from twinkle.server.store.journal import Journal
from twinkle.server.store.retry import retry_while_unavailable
from twinkle.server.store.run_files import RunFiles

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
    await _restore_runs(parts, found, read)
    # Not before: what was read must not be written again.
    parts.run_log.open(journal)
    await _restore_rest(parts, found)
    if found.runs:
        log.info("%d runs go on where they were", len(found.runs))


async def adopt(parts: Parts, directory: Path) -> int:
    """Take over the runs and requests of an engine that has ended, while this one works; returns how many runs.

    Its records become a segment of this engine's journal before anything else happens, and its directory is deleted at
    the end: whenever this process is killed, one of them has everything, and it can be done again.

    Args:
        directory: of the other engine's live runs.

    Raises:
        ServerFault: if the other engine still runs.
        Unavailable: if this engine's journal can't be written.
    """
    own = parts.run_log.journal
    assert own is not None and parts.live_files is not None, "an engine among several has a journal"
    files = parts.live_files(directory)
    journal = await asyncio.to_thread(Journal, directory / "journal", "never")
    try:
        payloads, is_damaged = await asyncio.to_thread(_payloads_of, journal)
        found = Found(is_damaged=is_damaged)
        read = [records.decode(payload) for payload in payloads]
        for record in read:
            found.add(record)
        if is_new := _leave_out_known(parts, found):
            for run_id in found.runs:
                await retry_while_unavailable(partial(_copy_newest, files, parts.run_files, run_id))
            segment = own.add_segment(await asyncio.to_thread(own.prepare_segment, payloads))
            async with parts.engine.between_calls():
                await _restore_runs(parts, found, [(segment, record) for record in read])
            await _restore_rest(parts, found)
        await retry_while_unavailable(lambda: files.delete_all_but(set()))
    finally:
        journal.close()
    await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    return len(found.runs) if is_new else 0


def _payloads_of(journal: Journal) -> tuple[list[bytes], bool]:
    """All records, and whether any may be missing. Blocking."""
    segments = [journal.examine(number) for number in journal.earlier]
    payloads = [payload for segment in segments for payload in segment.payloads]
    return payloads, any(segment.is_damaged for segment in segments)


def _leave_out_known(parts: Parts, found: Found) -> bool:
    """Take out what this engine has already: an earlier process of its own was killed while it took it over. Returns
    whether anything is left.
    """
    known = {each for each in found.accepted if parts.futures.is_known(each)}
    runs = {found.accepted[each].run_id for each in known} | set(parts.live.lost)
    for run_id in [run_id for run_id in found.runs if run_id in runs or run_id in parts.live]:
        del found.runs[run_id]
    for request_id in known:
        del found.accepted[request_id]
    return bool(found.runs or found.accepted or found.lost)


def _copy_newest(source: RunFiles, target: RunFiles, run_id: str) -> None:
    """Copy a run's newest usable snapshot. Blocking."""
    for number in reversed(source.numbers(run_id)):
        if source.is_whole(run_id, number):
            target.write(run_id, number, source.read(run_id, number))
            return


async def _restore_runs(parts: Parts, found: Found, read: Sequence[tuple[int, Record]]) -> None:
    """
    Args:
        read: all records, with the segments of this engine's journal that they are in.
    """

    async def loss_of(run: Run, request: m.ForwardBackwardRequest) -> CustomLoss | None:
        if request.loss_fn != CUSTOM_LOSS:
            return None
        await parts.losses.load(run.tenant, request)
        return parts.losses.of(run.session_id, request)

    runs = Restore(parts.live, parts.scheduler, parts.futures, parts.run_files)
    parts.engine.repeat(await runs.apply(found, loss_of))
    for segment, record in read:
        if not isinstance(record, Accepted) or record.run_id not in found.runs:
            continue
        if (run := parts.live.get(record.run_id)) is not None:
            run.note_logged(segment, record.seq_id)


async def _restore_rest(parts: Parts, found: Found) -> None:
    """What is not a run: lost ones, and requests on none."""
    for lost in parts.live.lost.values():
        if lost.run_id not in found.lost:
            parts.run_log.lost(lost)
    if found.is_damaged:
        parts.futures.note = f"; {_DAMAGED}"
    await _restore_requests(parts, found)


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
