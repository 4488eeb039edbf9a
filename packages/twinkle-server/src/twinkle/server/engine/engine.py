"""The loop that does the work: `step` is the architecture in a dozen lines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import cast

from twinkle.protocol import messages as m
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep
from twinkle.server.engine.adapters import AdapterKeeper
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.packing import pack, unpack
from twinkle.server.engine.recovery import Recovery, SetBacks
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job, Tick
from twinkle.server.scheduling.scheduler import Scheduler

log = logging.getLogger("twinkle.engine")

_ENDED_TWICE = (
    "the process that held the model ended while it computed this request, and ended again when the request was tried "
    "once more: don't send it again as it is; the server's log has what is known of the cause"
)
_NOT_BACK = (
    "the process that held the model ended and could not be started anew, so this run is lost: go on from its last "
    "checkpoint when the server is back"
)


class Engine:
    """Takes ticks from the scheduler, runs them on the worker, completes their futures; one tick at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        futures: FutureTable,
        worker: WorkerPort,
        adapters: AdapterKeeper,
        snapshots: Snapshots,
        residency: Residency,
        set_backs: SetBacks,
        recovery: Recovery,
        record_pass: Callable[[Job], None],
    ) -> None:
        """
        Args:
            record_pass: told of each training pass that has been computed.
        """
        self._scheduler = scheduler
        self._futures = futures
        self._worker = worker
        self._adapters = adapters
        self._snapshots = snapshots
        self._residency = residency
        self._set_backs = set_backs
        self._recovery = recovery
        self._record_pass = record_pass
        # What is under way: jobs leave it as they are done with. It may be one of the parts of a scheduler's tick, of
        # which the others wait.
        self._tick = Tick([], [], [])
        self._waiting: list[Tick] = []
        self._is_repeated = False
        self._has_failed = False

    @property
    def has_failed(self) -> bool:
        """Whether the worker was lost and could not be started anew, so that every job fails."""
        return self._has_failed

    async def run(self) -> None:
        """Step for ever; cancelled from outside."""
        while not self._has_failed:
            try:
                await self.step()
            except WorkerLost as loss:
                await self._recover(loss)
        while True:
            self._fail_all(await self._scheduler.next_tick())

    async def step(self) -> None:
        tick = await self._next_tick()
        await self._together(tick.passes, self._run_passes)
        await self._together(tick.optim_steps, self._run_optim_steps)
        await self._one_by_one(tick.others, self._run_other)

    async def _next_tick(self) -> Tick:
        """What a loss of the worker left undone, or else what comes next; snapshots are taken in between.

        Raises:
            WorkerLost: if it is lost meanwhile.
        """
        if not self._tick.jobs:
            self._is_repeated = False
            await self._snapshots.take_due()
            if not self._waiting:
                self._waiting = self._residency.split(await self._wait_for_tick())
            self._tick = self._waiting.pop(0)
        self._fail_unknowing(self._tick)
        self._residency.expect(self._tick)
        return self._tick

    async def _wait_for_tick(self) -> Tick:
        """A tick, or an empty one when a snapshot is due."""
        ready = asyncio.ensure_future(self._scheduler.next_tick())
        lost = asyncio.ensure_future(self._worker.lost())
        try:
            timeout = self._snapshots.seconds_until_due()
            await asyncio.wait({ready, lost}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():  # its jobs are in no queue any more: they come before everything else
                return ready.result()
            if lost.done():
                raise lost.result()
            return Tick([], [], [])
        finally:
            ready.cancel()
            lost.cancel()

    def _fail_unknowing(self, tick: Tick) -> None:
        """Fail the jobs of clients that don't know yet that their run was set back."""
        for jobs in (tick.passes, tick.optim_steps, tick.others):
            for job in list(jobs):
                failure = self._set_backs.failure_of(job)
                if failure is not None:
                    jobs.remove(job)
                    self._futures.complete(job.request_id, failure)

    async def _together(self, jobs: list[Job], run: Callable[[list[Job]], Awaitable[None]]) -> None:
        """Run the jobs as one. If that fails nothing has changed, so each is run alone: only the one at fault fails."""
        if len(jobs) > 1 and not self._is_repeated:
            try:
                await run(jobs)
            except WorkerLost:
                raise
            except Exception:
                pass  # it comes again where it belongs
            else:
                jobs.clear()
        await self._one_by_one(jobs, run)

    async def _one_by_one(self, jobs: list[Job], run: Callable[[list[Job]], Awaitable[None]]) -> None:
        while jobs:
            job = jobs[0]
            try:
                await run([job])
            except WorkerLost:
                if self._is_repeated:  # it was alone, and has been under way each time
                    self._futures.complete(job.request_id, m.Failure(error=_ENDED_TWICE, category="server"))
                    jobs.remove(job)
                raise
            except Exception as error:
                doing = f"{type(job.request).__name__} {job.seq_id} of {job.run_id}"
                self._futures.complete(job.request_id, to_failure(error, doing))
            jobs.remove(job)

    async def _recover(self, loss: WorkerLost) -> None:
        """Bring the worker back; what was under way is then run again, each job alone, in case one of them ended it."""
        self._is_repeated = True
        try:
            await self._recovery.recover(loss)
        except Exception as error:
            log.error("The model could not be started anew: %s", error)
            self._has_failed = True
            for tick in (self._tick, *self._waiting):
                self._fail_all(tick)

    def _fail_all(self, tick: Tick) -> None:
        for job in tick.jobs:
            self._futures.complete(job.request_id, m.Failure(error=_NOT_BACK, category="server"))

    async def _run_passes(self, jobs: list[Job]) -> None:
        await self._residency.bring_in((job.run_id for job in jobs), adding_gradients=True)
        packed = pack(jobs, self._worker.info.max_batch_tokens, self._worker.info.overhead_tokens)
        results = await self._worker.forward_backward(packed.micro_batches)
        for job, output in zip(jobs, unpack(jobs, packed, results), strict=True):
            self._futures.complete(job.request_id, output)
            if not cast(m.ForwardBackwardRequest, job.request).forward_only:
                self._snapshots.accumulated(job.run_id)
            self._record_pass(job)

    async def _run_optim_steps(self, jobs: list[Job]) -> None:
        await self._residency.bring_in(job.run_id for job in jobs)
        requests = [cast(m.OptimStepRequest, job.request) for job in jobs]
        steps = [
            AdamStep(job.run_id, request.adam_params or AdamParams())
            for job, request in zip(jobs, requests, strict=True)
        ]
        for job, metrics in zip(jobs, await self._worker.optim_step(steps), strict=True):
            self._futures.complete(job.request_id, m.OptimStepResponse(metrics=metrics))
            self._snapshots.stepped(job.run_id)

    async def _run_other(self, jobs: list[Job]) -> None:
        [job] = jobs
        match job.request:
            case m.CreateModelRequest():
                await self._adapters.create(job)
            case m.UnloadModelRequest():
                await self._adapters.unload(job)
            case m.SaveWeightsRequest():
                await self._adapters.save(job, job.request)
            case m.SaveWeightsForSamplerRequest():
                await self._adapters.save_for_sampler(job, job.request)
            case m.SaveWeightsExternalRequest():
                await self._adapters.save_external(job, job.request)
            case m.LoadWeightsRequest():
                await self._adapters.load(job, job.request)
                self._set_backs.forget(job.run_id)
            case m.ForwardBackwardRequest() | m.OptimStepRequest():
                raise AssertionError("the scheduler puts these elsewhere")
