"""The jobs that compute nothing: creating, saving, loading and unloading adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.checkpoints.checkpoints import Checkpoints, Save, unnamed_uri
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.runs import Job, ReadCheckpoint, Run, RunState
from twinkle.server.scheduling.scheduler import Scheduler

SaveRequest: TypeAlias = m.SaveWeightsRequest | m.SaveWeightsForSamplerRequest | m.SaveWeightsExternalRequest


class AdapterJobs:
    """Called by the engine, one job at a time.

    A save exports the adapter in the run's order; the files are written while the engine goes on. A load's checkpoint
    is read while the engine goes on with other runs.
    """

    def __init__(
        self,
        live: LiveRuns,
        scheduler: Scheduler,
        futures: FutureTable,
        worker: WorkerPort,
        sampler_adapters: SamplerAdapters,
        snapshots: Snapshots,
        residency: Residency,
        checkpoints: Checkpoints,
    ) -> None:
        self._live = live
        self._scheduler = scheduler
        self._futures = futures
        self._worker = worker
        self._sampler_adapters = sampler_adapters
        self._snapshots = snapshots
        self._residency = residency
        self._checkpoints = checkpoints
        self._readings: set[asyncio.Task[ReadCheckpoint]] = set()

    async def run(self, job: Job, is_repeat: bool) -> None:
        """
        Raises:
            WorkerLost: the job may be run again.
            Exception: whatever the job fails with.
        """
        match job.request:
            case m.CreateModelRequest():
                await self._create(job)
            case m.UnloadModelRequest():
                await self._unload(job)
            case m.SaveWeightsRequest():
                await self._save(job, job.request)
            case m.SaveWeightsForSamplerRequest(path=None):
                await self._save_unnamed(job, job.request)
            case m.SaveWeightsForSamplerRequest():
                await self._save_for_sampler(job, job.request)
            case m.SaveWeightsExternalRequest():
                await self._save_external(job, job.request)
            case m.LoadWeightsRequest() if job.run.reading is None and not is_repeat:
                self._read_beside(job, job.request)
            case m.LoadWeightsRequest():
                await self._load(job, job.request)
            case m.ForwardBackwardRequest() | m.OptimStepRequest():
                raise AssertionError("these are computation")

    def close(self) -> None:
        """Stop the reads under way."""
        for reading in self._readings:
            reading.cancel()

    # ------------------------------------------------------------ begin and end

    async def _create(self, job: Job) -> None:
        run = job.run
        try:
            await self._residency.bring_in([run])
            await self._worker.add_adapter(run.run_id, run.spec)
        except WorkerLost:
            raise  # the engine runs the job again
        except BaseException:
            self._end(run)
            raise
        self._residency.added(run)
        self._futures.complete(job.request_id, m.CreateModelResponse(model_id=run.run_id))

    async def _unload(self, job: Job) -> None:
        run = job.run
        if run.state is RunState.RESIDENT:
            await self._worker.remove_adapter(run.run_id)
        self._end(run)
        self._futures.complete(job.request_id, m.UnloadModelResponse(model_id=run.run_id))

    def _end(self, run: Run) -> None:
        """The run has ended, and its adapter is off the worker."""
        self._residency.drop(run, run.state)
        self._live.end(run)
        self._snapshots.drop(run)

    # ------------------------------------------------------------ save

    async def _save(self, job: Job, request: m.SaveWeightsRequest) -> None:
        uri = CheckpointUri(request.path, job.run.run_id, "weights")
        state = await self._export(job.run, with_optimizer=True)
        save = self._description(job, uri, request)
        self._write_behind(job, save, state, lambda _size: m.SaveWeightsResponse(path=str(uri)))

    async def _save_for_sampler(self, job: Job, request: m.SaveWeightsForSamplerRequest) -> None:
        assert request.path is not None, "without a path they are ephemeral"
        uri = CheckpointUri(request.path, job.run.run_id, "sampler_weights")
        state = await self._export(job.run, with_optimizer=False)
        save = self._description(job, uri, request)
        self._write_behind(job, save, state, lambda _size: m.SaveWeightsForSamplerResponse(path=str(uri)))

    async def _save_external(self, job: Job, request: m.SaveWeightsExternalRequest) -> None:
        uri = CheckpointUri(request.path, job.run.run_id, "external_weights")
        state = await self._export(job.run, with_optimizer=False)
        save = self._description(job, uri, request)
        self._write_behind(
            job, save, state, lambda size: m.SaveWeightsExternalResponse(path=str(uri), size_bytes=size)
        )

    def _description(self, job: Job, uri: CheckpointUri, request: SaveRequest) -> Save:
        run = job.run
        is_external = isinstance(request, m.SaveWeightsExternalRequest)
        return Save(
            uri=uri,
            tenant=run.tenant,
            session_id=run.session_id,
            base_model=run.base_model,
            request_id=job.request_id,
            ttl_seconds=request.ttl_seconds,
            user_metadata=None if is_external else request.user_metadata,
            recipients=(request.age_encryption_recipients or ()) if is_external else (),
            overwrite=isinstance(request, m.SaveWeightsRequest) and request.overwrite,
        )

    async def _export(self, run: Run, with_optimizer: bool) -> AdapterState:
        await self._residency.bring_in([run])
        return await self._worker.export_adapter(run.run_id, with_optimizer)

    def _write_behind(
        self, job: Job, save: Save, state: AdapterState, result: Callable[[int], m.Result]
    ) -> None:
        """Check and write in the background, since both may take long; `result` takes the size in bytes."""

        async def write_and_complete() -> None:
            try:
                size = await self._checkpoints.save(save, state)
            except Exception as error:
                self._futures.complete(job.request_id, to_failure(error, f"saving {save.uri}"))
            else:
                self._futures.complete(job.request_id, result(size))

        self._checkpoints.begin(job.run, save.uri, write_and_complete())

    async def _save_unnamed(self, job: Job, request: m.SaveWeightsForSamplerRequest) -> None:
        """Ephemeral sampler weights: into the sampler's memory first, so that sampling can begin; then to files, so
        that the sampler may evict them later.
        """
        uri = unnamed_uri(job.run.run_id, job.seq_id)
        save = self._description(job, uri, request)
        sampler_id = f"{save.session_id}:sample:{request.sampling_session_seq_id}"
        state = await self._export(job.run, with_optimizer=False)
        await self._sampler_adapters.publish(job.run.run_id, str(uri), state)

        async def write_and_release() -> None:
            try:
                await self._checkpoints.put_sampler(save, sampler_id)
                # Journaled only once the files are there: after a crash in between, the save is done again.
                result = m.SaveWeightsForSamplerResponse(sampling_session_id=sampler_id)
                self._futures.complete(job.request_id, result, record=False)
                await self._checkpoints.write(save, state)
            except Exception as error:  # it stays pinned in the sampler, where it works
                self._futures.complete(job.request_id, to_failure(error, f"writing {uri}"))
            else:
                self._futures.record(job.request_id)
                await self._sampler_adapters.release(str(uri))
                self._checkpoints.trim_unnamed(job.run)

        self._checkpoints.begin(job.run, uri, write_and_release())

    # ------------------------------------------------------------ load

    def _read_beside(self, job: Job, request: m.LoadWeightsRequest) -> None:
        """Read a load's checkpoint while the ticks go on; only the job's own run waits for it."""
        self._scheduler.hold(job)
        reading = job.run.reading = asyncio.create_task(self._read(job, request))
        self._readings.add(reading)

        def give_back(_reading: object) -> None:
            self._readings.discard(reading)
            self._scheduler.give_back(job)

        reading.add_done_callback(give_back)

    async def _read(self, job: Job, request: m.LoadWeightsRequest) -> ReadCheckpoint:
        """Read the checkpoint that a load job names. May take long: a slow disk, a locked database.

        Raises:
            InvalidRequest, NotFound: if there is nothing that can be loaded.
        """
        checkpoint = await self._checkpoints.find(
            job.run.tenant, request.path, token=request.weights_access_token
        )
        # Another base model may have layers of the same shapes: only its name tells them apart.
        ours = job.run.base_model
        if plain_name(checkpoint.base_model) != ours:
            raise InvalidRequest(
                f"path: the checkpoint was trained on {checkpoint.base_model!r}, and can't be loaded into a run on "
                f"{ours!r}"
            )
        return checkpoint.uri, await self._checkpoints.read(checkpoint.uri, with_optimizer=request.optimizer)

    async def _load(self, job: Job, request: m.LoadWeightsRequest) -> None:
        run, is_new_run = job.run, request.model_id is None
        try:
            uri, state = await (run.reading or self._read(job, request))
            await self._residency.bring_in([run])
            if is_new_run:
                await self._worker.add_adapter(run.run_id, run.spec)
            await self._worker.import_adapter(run.run_id, state)
        except WorkerLost:
            raise  # the engine runs the job again
        except BaseException:
            run.reading = None
            if is_new_run:
                self._end(run)
            raise
        run.reading = None
        if is_new_run:
            self._residency.added(run)
        await self._snapshots.loaded(job, state)
        self._futures.complete(job.request_id, m.LoadWeightsResponse(path=str(uri), model_id=run.run_id))
