"""A new process goes on where an earlier one ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from twinkle.protocol import messages as m
from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.operations import Encoded, digest
from twinkle.server.backends.protocol import CustomLoss
from twinkle.server.engine.adapters import AdapterKeeper
from twinkle.server.engine.compaction import RunLog
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.restore import Found, Restore
from twinkle.server.engine.runs import LiveRun, LostRun
from twinkle.server.engine.samples import SampleRunner
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.stuck_runs import StuckRuns
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job
from twinkle.server.scheduling.records import Accepted
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.service import validation
from twinkle.server.service.losses import CustomLosses
from twinkle.server.service.sampling_sessions import SamplingSessions
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

    runs: dict[str, LiveRun]
    lost: dict[str, LostRun]
    scheduler: Scheduler
    futures: FutureTable
    worker: WorkerPort
    run_log: RunLog
    run_files: RunFiles
    snapshots: Snapshots
    residency: Residency
    keeper: AdapterKeeper
    samples: SampleRunner
    sampling_sessions: SamplingSessions
    losses: CustomLosses
    sessions: SessionDesk
    stuck_runs: StuckRuns

    async def go_on(
        self, open_journal: Callable[[], Journal], repeat: Callable[[list[list[Job]]], None]
    ) -> None:
        """
        Args:
            open_journal: blocking.
            repeat: told of the calls that are to be made again, in order.
        """
        journal = await asyncio.to_thread(open_journal)
        found = Found()
        read, found.is_damaged = await asyncio.to_thread(self.run_log.read_earlier, journal)
        for segment, record in read:
            self.run_log.note_earlier(segment, record)
            found.add(record)
        await asyncio.to_thread(self.run_files.delete_all_but, set(found.runs))
        restore = Restore(
            self.runs,
            self.lost,
            self.scheduler,
            self.futures,
            self.snapshots,
            self.residency,
            self.run_files,
            self._loss_of,
        )
        repeat(await restore.apply(found))
        self.run_log.open(journal)
        for run in self.lost.values():
            if run.run_id not in found.lost:
                self.run_log.lost(run)
        if found.is_damaged:
            self.futures.note = f"; {_DAMAGED}"
        self.stuck_runs.restored(found.runs)
        for record in found.accepted.values():
            is_snapshot = record.kind is m.SaveWeightsForSamplerRequest
            if is_snapshot and record.run_id is not None and self.futures.is_pending(record.request_id):
                self.keeper.expect_unnamed(record.run_id, record.seq_id)
        for record in found.accepted.values():
            if record.run_id is None:
                await self._put_back(record, found.outcomes.get(record.request_id))
        if found.runs:
            log.info("%d runs go on where they were", len(found.runs))

    async def _loss_of(self, run: LiveRun, request: m.ForwardBackwardRequest) -> CustomLoss | None:
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
        sampler = await self.sampling_sessions.find(record.tenant, request.sampling_session_id)
        self.sessions.expect(sampler.session_id)
        if outcome is not None:
            self.samples.restore(sampler, request, record.request_id, digest(request), outcome)
            return
        validation.check_sample(request, self.worker.info)  # this model may read less than the earlier one's
        targets = validation.target_tokens(request, self.worker.info)
        self.samples.begin(sampler, request, record.request_id, digest(request), targets)
