"""The loop that does the work: `step` is the architecture in a dozen lines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from twinkle.protocol import messages as m
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep
from twinkle.server.engine.adapters import AdapterKeeper
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.packing import pack, unpack
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job
from twinkle.server.scheduling.scheduler import Scheduler


class Engine:
    """Takes ticks from the scheduler, runs them on the worker, completes their futures; one tick at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        futures: FutureTable,
        worker: WorkerPort,
        adapters: AdapterKeeper,
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
        self._record_pass = record_pass

    async def run(self) -> None:
        """Step for ever; cancelled from outside."""
        while True:
            await self.step()

    async def step(self) -> None:
        tick = await self._scheduler.next_tick()
        await self._together(tick.passes, self._run_passes)
        await self._together(tick.optim_steps, self._run_optim_steps)
        for job in tick.others:
            await self._together([job], self._run_other)

    async def _together(self, jobs: list[Job], run: Callable[[list[Job]], Awaitable[None]]) -> None:
        """Run the jobs as one. If that fails nothing has changed, so each is run alone: only the one at fault fails."""
        if not jobs:
            return
        try:
            await run(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    await self._together([job], run)
            else:
                doing = f"{type(jobs[0].request).__name__} {jobs[0].seq_id} of {jobs[0].run_id}"
                self._futures.complete(jobs[0].request_id, to_failure(error, doing))

    async def _run_passes(self, jobs: list[Job]) -> None:
        packed = pack(jobs, self._worker.info.max_batch_tokens)
        results = await self._worker.forward_backward(packed.micro_batches)
        for job, output in zip(jobs, unpack(jobs, packed, results), strict=True):
            self._futures.complete(job.request_id, output)
            self._record_pass(job)

    async def _run_optim_steps(self, jobs: list[Job]) -> None:
        requests = [cast(m.OptimStepRequest, job.request) for job in jobs]
        steps = [
            AdamStep(job.run_id, request.adam_params or AdamParams())
            for job, request in zip(jobs, requests, strict=True)
        ]
        for job, metrics in zip(jobs, await self._worker.optim_step(steps), strict=True):
            self._futures.complete(job.request_id, m.OptimStepResponse(metrics=metrics))

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
            case m.ForwardBackwardRequest() | m.OptimStepRequest():
                raise AssertionError("the scheduler puts these elsewhere")
