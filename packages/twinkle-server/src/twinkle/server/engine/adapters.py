"""The jobs that are not computation: an adapter is created, saved, loaded, unloaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.checkpoints.checkpoints import Checkpoints, Save, unnamed_uri
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job
from twinkle.server.scheduling.live_runs import LiveRuns

ReadCheckpoint: TypeAlias = tuple[CheckpointUri, AdapterState]
SaveRequest: TypeAlias = m.SaveWeightsRequest | m.SaveWeightsForSamplerRequest | m.SaveWeightsExternalRequest


class AdapterJobs:
    """Called by the engine, one job at a time.

    A save exports the adapter in the run's order; files are written while the engine goes on. What a load needs is read
    while the engine goes on with other runs.
    """

    def __init__(
        self,
        runs: dict[str, LiveRun],
        live: LiveRuns,
        futures: FutureTable,
        worker: WorkerPort,
        sampler_adapters: SamplerAdapters,
        snapshots: Snapshots,
        residency: Residency,
        checkpoints: Checkpoints,
    ) -> None:
        self._runs = runs
        self._live = live
        self._futures = futures
        self._worker = worker
        self._sampler_adapters = sampler_adapters
        self._snapshots = snapshots
        self._residency = residency
        self._checkpoints = checkpoints

    # ------------------------------------------------------------ begin and end

    async def create(self, job: Job) -> None:
        try:
            await self._residency.bring_in([job.run_id])
            await self._worker.add_adapter(job.run_id, self._runs[job.run_id].spec)
        except WorkerLost:
            raise  # the engine runs the job again
        except BaseException:
            self._live.forget(job.run_id)
            raise
        self._begin(job.run_id)
        self._futures.complete(job.request_id, m.CreateModelResponse(model_id=job.run_id))

    def _begin(self, run_id: str) -> None:
        """The run's adapter was made."""
        self._snapshots.begin(self._runs[run_id])
        self._residency.added(run_id)

    async def unload(self, job: Job) -> None:
        if not self._residency.is_evicted(job.run_id):
            await self._worker.remove_adapter(job.run_id)
        self._live.forget(job.run_id)
        self._futures.complete(job.request_id, m.UnloadModelResponse(model_id=job.run_id))

    # ------------------------------------------------------------ save

    async def save(self, job: Job, request: m.SaveWeightsRequest) -> None:
        uri = CheckpointUri(request.path, job.run_id, "weights")
        state = await self._export(job.run_id, with_optimizer=True)
        save = self._save(job, uri, request)
        self._write_behind(job, save, state, lambda _size: m.SaveWeightsResponse(path=str(uri)))

    async def save_for_sampler(self, job: Job, request: m.SaveWeightsForSamplerRequest) -> None:
        if request.path is None:
            await self._save_unnamed(job, request)
            return
        uri = CheckpointUri(request.path, job.run_id, "sampler_weights")
        state = await self._export(job.run_id, with_optimizer=False)
        save = self._save(job, uri, request)
        self._write_behind(job, save, state, lambda _size: m.SaveWeightsForSamplerResponse(path=str(uri)))

    async def save_external(self, job: Job, request: m.SaveWeightsExternalRequest) -> None:
        uri = CheckpointUri(request.path, job.run_id, "external_weights")
        state = await self._export(job.run_id, with_optimizer=False)
        save = self._save(job, uri, request)
        self._write_behind(
            job, save, state, lambda size: m.SaveWeightsExternalResponse(path=str(uri), size_bytes=size)
        )

    def _save(self, job: Job, uri: CheckpointUri, request: SaveRequest) -> Save:
        run = self._runs[job.run_id]
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

    async def _export(self, run_id: str, with_optimizer: bool) -> AdapterState:
        await self._residency.bring_in([run_id])
        return await self._worker.export_adapter(run_id, with_optimizer)

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

        self._checkpoints.begin(save.uri, save.tenant, write_and_complete())

    async def _save_unnamed(self, job: Job, request: m.SaveWeightsForSamplerRequest) -> None:
        """Ephemeral sampler weights: in the sampler's memory first, so that sampling can begin; the files follow, so
        that the adapter may leave the sampler later.
        """
        uri = unnamed_uri(job.run_id, job.seq_id)
        save = self._save(job, uri, request)
        sampler_id = f"{save.session_id}:sample:{request.sampling_session_seq_id}"
        state = await self._export(job.run_id, with_optimizer=False)
        await self._sampler_adapters.publish(job.run_id, str(uri))

        async def write_and_release() -> None:
            try:
                await self._checkpoints.put_sampler(save, sampler_id)
                # Not journaled until the files are there: after a crash in between, the save is done again.
                self._futures.complete_for_now(
                    job.request_id, m.SaveWeightsForSamplerResponse(sampling_session_id=sampler_id)
                )
                await self._checkpoints.write(save, state)
            except Exception as error:  # it stays pinned in the sampler, where it works
                self._futures.complete(job.request_id, to_failure(error, f"writing {uri}"))
            else:
                self._futures.complete_for_good(job.request_id)
                await self._sampler_adapters.release(str(uri))
                self._checkpoints.trim_unnamed(job.run_id, save.tenant)

        self._checkpoints.begin(uri, save.tenant, write_and_release())

    # ------------------------------------------------------------ load

    async def read_for(self, job: Job, request: m.LoadWeightsRequest) -> ReadCheckpoint:
        """The checkpoint that a load job names. May take long: a slow disk, a locked database.

        Raises:
            InvalidRequest, NotFound: if there is nothing that could be loaded.
        """
        checkpoint = await self._checkpoints.find(
            job.tenant, request.path, token=request.weights_access_token
        )
        # Another base model may have layers of the same shapes: only its name tells.
        ours = self._runs[job.run_id].base_model
        if plain_name(checkpoint.base_model) != ours:
            raise InvalidRequest(
                f"path: the checkpoint was trained on {checkpoint.base_model!r}, and can't be loaded into a run on "
                f"{ours!r}"
            )
        return checkpoint.uri, await self._checkpoints.read(checkpoint.uri, with_optimizer=request.optimizer)

    async def load(self, job: Job, request: m.LoadWeightsRequest, reading: Awaitable[ReadCheckpoint]) -> None:
        """
        Args:
            reading: `read_for` the same job.
        """
        is_new_run = request.model_id is None
        try:
            uri, state = await reading
            await self._residency.bring_in([job.run_id])
            if is_new_run:
                await self._worker.add_adapter(job.run_id, self._runs[job.run_id].spec)
            await self._worker.import_adapter(job.run_id, state)
        except WorkerLost:
            raise  # the engine runs the job again
        except BaseException:
            if is_new_run:
                self._live.forget(job.run_id)
            raise
        if is_new_run:
            self._begin(job.run_id)
        await self._snapshots.loaded(job, state)
        self._futures.complete(job.request_id, m.LoadWeightsResponse(path=str(uri), model_id=job.run_id))
