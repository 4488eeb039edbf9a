"""A new process goes on where an earlier one ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.operations import digest
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.engine.compaction import Compaction
from twinkle.server.engine.engine import Engine
from twinkle.server.engine.restore import Found, Restore
from twinkle.server.engine.samples import SampleRunner
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import Accepted, RunLog
from twinkle.server.scheduling.runs import Run
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.service import validation
from twinkle.server.service.losses import CustomLosses
from twinkle.server.service.sampling_sessions import Samplers
from twinkle.server.service.session_desk import SessionDesk
from twinkle.server.store.journal import Journal
from twinkle.server.store.run_files import RunFiles

_DAMAGED = (
    "a part of what the server had written down of runs and requests was damaged on its disk, and this may have been "
    "in it: then it is lost"
)

log = logging.getLogger("twinkle.server")


@dataclass(frozen=True, eq=False)
class Restart:
    """What an earlier process knew is put back here, before anything is asked of this one."""

    live: LiveRuns
    scheduler: Scheduler
    futures: FutureTable
    worker: WorkerPort
    run_log: RunLog
    compaction: Compaction
    run_files: RunFiles
    engine: Engine
    checkpoints: Checkpoints
    samples: SampleRunner
    samplers: Samplers
    losses: CustomLosses
    sessions: SessionDesk

    async def go_on(self, open_journal: Callable[[], Journal]) -> None:
        """
        Args:
            open_journal: blocking.
        """
        journal = await asyncio.to_thread(open_journal)
        found = Found()
        read, found.is_damaged = await asyncio.to_thread(self.compaction.read_earlier, journal)
        for _, record in read:
            found.add(record)
        await asyncio.to_thread(self.run_files.delete_all_but, set(found.runs))
        restore = Restore(self.live, self.scheduler, self.futures, self.run_files)
        self.engine.repeat(await restore.apply(found, self._loss_of))
        for segment, record in read:
            if isinstance(record, Accepted) and (run := self.live.get(record.run_id)) is not None:
                run.note_logged(segment, record.seq_id)
        self.run_log.open(journal)
        for lost in self.live.lost.values():
            if lost.run_id not in found.lost:
                self.run_log.lost(lost)
        if found.is_damaged:
            self.futures.note = f"; {_DAMAGED}"
        for record in found.accepted.values():
            is_snapshot = record.kind is m.SaveWeightsForSamplerRequest
            if is_snapshot and record.run_id is not None and self.futures.is_pending(record.request_id):
                self.checkpoints.expect_unnamed(record.run_id, record.seq_id)
        for record in found.accepted.values():
            if record.run_id is None:
                await self._put_back(record, found.outcomes.get(record.request_id))
        if found.runs:
            log.info("%d runs go on where they were", len(found.runs))

    async def _loss_of(self, run: Run, request: m.ForwardBackwardRequest) -> CustomLoss | None:
        await self.losses.load(run.tenant, request)
        return self.losses.of(run, request)

    async def _put_back(self, record: Accepted, outcome: Encoded | None) -> None:
        """Of no run: a sample is drawn again, unless it has been; a loss is kept once more."""
        request = record.request()
        try:
            if isinstance(request, m.SampleRequest):
                await self._put_back_sample(record, request, outcome)
            elif isinstance(request, m.CreateCustomLossRequest) and outcome is None:
                loss_id = await self.losses.create(record.tenant, request, self.worker.loss_fns)
                self.futures.restore(record.request_id, m.CreateCustomLossResponse(loss_id=loss_id))
        except TwinkleError as error:
            failure = m.Failure(error=error.message, category=error.category)
            if outcome is None:
                self.futures.restore(record.request_id, failure)

    async def _put_back_sample(
        self, record: Accepted, request: m.SampleRequest, outcome: Encoded | None
    ) -> None:
        sampler = await self.samplers.find(record.tenant, request.sampling_session_id)
        self.sessions.expect(sampler.session_id)
        if outcome is not None:
            self.samples.restore(sampler, request, record.request_id, digest(request), outcome)
            return
        validation.check_sample(request, self.worker.info)  # this model may read less than the earlier one's
        targets = validation.target_tokens(request, self.worker.info)
        self.samples.begin(sampler, request, record.request_id, digest(request), targets)
