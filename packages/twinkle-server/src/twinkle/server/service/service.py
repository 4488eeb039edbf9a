"""The verbs for one base model, as the gateway and local mode call them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.protocol.types import LoraConfig
from twinkle.server.backends.protocol import DEFAULT_ALPHA, AdapterSpec
from twinkle.server.engine.adapters import AdapterKeeper
from twinkle.server.engine.engine import Engine
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.sampling import SampleRunner
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job, RunRequest
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.service import queries, validation
from twinkle.server.store import tables
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database

DEFAULT_RANK = 32


class Service:
    """One base model's service: `submit` queues an operation, `retrieve` waits for its result, `ask` answers queries.

    Single-threaded: everything is called on one event loop, on which nothing computes or waits for a disk.
    """

    def __init__(
        self,
        model_name: str,
        worker: WorkerPort,
        database: Database,
        files: CheckpointFiles,
        max_resident_sampler_adapters: int = 64,
    ) -> None:
        """
        Args:
            model_name: the id under which clients ask for the base model.
        """
        self._model_name = model_name
        self._worker = worker
        self._database = database
        self._runs: dict[str, LiveRun] = {}
        self._samplers: dict[str, tables.Sampler] = {}  # rows that were looked up; they never change
        self._futures = FutureTable(time.monotonic)
        self._scheduler = Scheduler(tick_tokens=8 * worker.info.max_batch_tokens)
        sampler_adapters = SamplerAdapters(worker, max_resident_sampler_adapters)
        self._keeper = AdapterKeeper(
            self._runs, self._futures, worker, sampler_adapters, files, database, self._forget_run
        )
        self._samples = SampleRunner(self._futures, worker, sampler_adapters, self._keeper)
        self._engine = Engine(self._scheduler, self._futures, worker, self._keeper)
        self._loop_task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin to work, and return when a training step and a sample have succeeded."""
        await warm_up(self._worker)
        self._loop_task = asyncio.create_task(self._engine.run())

    async def close(self) -> None:
        """Stop working; what is being written is written."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        await self._samples.close()
        await self._keeper.settle()
        await self._worker.close()
        self._database.close()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if the loop has ended.
        """
        if self._loop_task is None or self._loop_task.done():
            raise RuntimeError("the engine's loop has ended")

    # ------------------------------------------------------------ operations

    async def submit(self, tenant: str, request: m.Operation) -> m.Promise:
        """Accept an operation.

        Raises:
            InvalidRequest, NotFound: if it can't be done; its `seq_id` is consumed.
        """
        match request:
            case m.CreateModelRequest():
                return await self._create_run(tenant, request)
            case m.LoadWeightsRequest(model_id=None):
                return await self._create_run_from_checkpoint(tenant, request)
            case m.UnloadModelRequest():
                return self._unload(tenant, request)
            case m.SampleRequest():
                return await self._sample(tenant, request)
            case _:
                return self._submit_ordered(tenant, request)

    def _submit_ordered(self, tenant: str, request: m.Ordered) -> m.Promise:
        run = self._live_run(tenant, request.model_id)
        seq_id = request.seq_id
        if seq_id is None:
            raise InvalidRequest("seq_id: missing; number the requests of a run 1, 2, 3, ...")
        queue = self._scheduler.queue(run.run_id)
        if (first := queue.duplicate_of(seq_id)) is not None:
            return m.Promise(request_id=first, model_id=run.run_id)
        queue.check(seq_id)
        try:
            tokens = self._check_ordered(request)
        except InvalidRequest:
            self._scheduler.reject(run.run_id, tenant, seq_id)
            raise
        return self._enqueue(run, seq_id, request, tokens)

    def _check_ordered(self, request: m.Ordered) -> int:
        """Validate a request on a run; returns its cost in tokens."""
        match request:
            case m.ForwardBackwardRequest():
                return validation.check_pass(request, self._worker.info, self._worker.loss_fns)
            case m.OptimStepRequest():
                if request.optimizer_params is not None:
                    validation.check_optimizer(request.optimizer_params, "optimizer_params.type")
            case m.SaveWeightsRequest():
                _check_new_name(request.path)
            case m.SaveWeightsForSamplerRequest():
                if request.path is not None:
                    _check_new_name(request.path)
                elif request.sampling_session_seq_id is None:
                    raise InvalidRequest(
                        "path: missing; give a name, or sampling_session_seq_id for a snapshot"
                    )
            case m.LoadWeightsRequest():
                uris.parse(request.path)
        return 0

    def _enqueue(self, run: LiveRun, seq_id: int, request: RunRequest, tokens: int = 0) -> m.Promise:
        request_id = self._futures.create(run.tenant)
        self._scheduler.submit(Job(request_id, run.tenant, run.run_id, seq_id, request, tokens))
        return m.Promise(request_id=request_id, model_id=run.run_id)

    def _unload(self, tenant: str, request: m.UnloadModelRequest) -> m.Promise:
        run = self._live_run(tenant, request.model_id)
        queue = self._scheduler.queue(run.run_id)
        queue.close_gaps()  # nobody is going to send what is missing
        return self._enqueue(run, queue.next_free, request)

    # ------------------------------------------------------------ runs

    async def _create_run(self, tenant: str, request: m.CreateModelRequest) -> m.Promise:
        validation.check_base_model(request.base_model, self._model_name)
        config = request.lora_config or LoraConfig(rank=DEFAULT_RANK)
        validation.check_lora_config(config, self._worker.info)
        validation.check_optimizer(request.optimizer_config, "optimizer_config.type")
        spec = AdapterSpec(
            rank=config.rank,
            alpha=config.alpha if config.alpha is not None else DEFAULT_ALPHA,
            seed=config.seed if config.seed is not None else secrets.randbits(63),
            train_attn=config.train_attn,
            train_mlp=config.train_mlp,
            train_unembed=config.train_unembed,
        )
        return await self._begin_run(tenant, request.session_id, request.model_seq_id, spec, request)

    async def _create_run_from_checkpoint(self, tenant: str, request: m.LoadWeightsRequest) -> m.Promise:
        if request.session_id is None or request.model_seq_id is None:
            raise InvalidRequest(
                "model_id: missing; name a run, or session_id and model_seq_id for a new one"
            )
        checkpoint = await self._keeper.find(tenant, request.path)
        validation.check_base_model(
            checkpoint.base_model, self._model_name, "path: the checkpoint's base model"
        )
        # Shape and scale come from the files, so that one who edited the row can't make them disagree.
        spec = (await self._keeper.read(checkpoint.uri)).spec
        return await self._begin_run(tenant, request.session_id, request.model_seq_id, spec, request)

    async def _begin_run(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        spec: AdapterSpec,
        request: m.CreateModelRequest | m.LoadWeightsRequest,
    ) -> m.Promise:
        await self._check_session(tenant, session_id)
        run = LiveRun(f"{session_id}:train:{model_seq_id}", tenant, session_id, self._model_name, spec)
        if run.run_id in self._runs:
            first = self._scheduler.queue(run.run_id).duplicate_of(0)
            assert first is not None, "creation is a run's first request"
            return m.Promise(request_id=first, model_id=run.run_id)
        self._runs[run.run_id] = run
        self._scheduler.add_run(run.run_id)
        promise = self._enqueue(run, 0, request)
        now = time.time()
        row = tables.Run(
            id=run.run_id,
            tenant=tenant,
            session_id=session_id,
            base_model=self._model_name,
            created_at=now,
            last_request_at=now,
            rank=spec.rank,
            user_metadata=request.user_metadata,
        )
        await asyncio.to_thread(self._database.put, row)
        return promise

    def _forget_run(self, run_id: str) -> None:
        """Take a run out of the scheduler; what it still had queued fails."""
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        for job in self._scheduler.remove_run(run_id, run.tenant):
            failure = m.Failure(error=f"model_id: run {run_id} has ended", category="user")
            self._futures.complete(job.request_id, failure)

    def _live_run(self, tenant: str, run_id: str | None) -> LiveRun:
        run = self._runs.get(run_id or "")
        if run is None or run.tenant != tenant:
            raise NotFound(
                f"model_id: no live run {(run_id or '')[:200]!r}; it never was, has ended, or the server was started "
                "anew: begin one with create_model, or from a checkpoint with create_training_client_from_state"
            )
        return run

    async def _check_session(self, tenant: str, session_id: str) -> None:
        if await asyncio.to_thread(self._database.session, tenant, session_id) is None:
            raise NotFound(f"session_id: no session {session_id[:80]!r}; begin one with create_session")

    # ------------------------------------------------------------ sampling

    async def _sample(self, tenant: str, request: m.SampleRequest) -> m.Promise:
        sampler = self._samplers.get(request.sampling_session_id)
        if sampler is None or sampler.tenant != tenant:
            sampler = await queries.find_sampler(self._database, tenant, request.sampling_session_id)
            self._samplers[sampler.id] = sampler
        validation.check_sample(request, self._worker.info)
        return self._samples.submit(sampler, request)

    # ------------------------------------------------------------ results and queries

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.Pending:
        """The result, or `Pending` after `timeout` seconds without one."""
        outcome = await self._futures.wait(tenant, request_id, timeout)
        return m.Pending(request_id=request_id) if outcome is None else outcome

    async def ask(self, tenant: str, query: m.Query) -> m.Reply:
        """Answer a query.

        Raises:
            InvalidRequest, NotFound: as fits.
        """
        match query:
            case m.GetServerCapabilities():
                return queries.capabilities(self._model_name, self._worker.info)
            case m.GetInfoRequest():
                run = self._live_run(tenant, query.model_id)
                return queries.run_info(run, self._worker.info)
            case m.CreateSessionRequest():
                return await queries.create_session(self._database, tenant, query)
            case m.SessionHeartbeatRequest():
                await self._check_session(tenant, query.session_id)
                return m.SessionHeartbeatResponse()
            case m.FinishSessionRequest():
                return await self._finish_session(tenant, query)
            case m.CreateSamplingSessionRequest():
                return await self._create_sampling_session(tenant, query)
            case m.DeleteCheckpoint():
                await self._keeper.delete(await self._keeper.find(tenant, queries.uri_of(query)))
                return m.Acknowledged()
            case m.WeightsInfoRequest():
                return queries.weights_info(await self._keeper.find(tenant, query.tinker_path, "tinker_path"))
            case _:
                return await queries.answer(self._database, tenant, query)

    async def _create_sampling_session(
        self, tenant: str, request: m.CreateSamplingSessionRequest
    ) -> m.CreateSamplingSessionResponse:
        await self._check_session(tenant, request.session_id)
        if request.base_model is not None:
            validation.check_base_model(request.base_model, self._model_name)
        if request.base_model is None and request.model_path is None:
            raise InvalidRequest(
                "base_model: missing; give a base model, or the path of a checkpoint as model_path"
            )
        checkpoint: tables.Checkpoint | None = None
        if request.model_path is not None:
            checkpoint = await self._keeper.find(tenant, request.model_path, "model_path")
            validation.check_base_model(
                checkpoint.base_model, self._model_name, "model_path: the checkpoint's base model"
            )
        row = tables.Sampler(
            id=f"{request.session_id}:sample:{request.sampling_session_seq_id}",
            tenant=tenant,
            session_id=request.session_id,
            base_model=self._model_name,
            model_path=str(checkpoint.uri) if checkpoint else None,
            checkpoint_time=checkpoint.created_at if checkpoint else None,
            created_at=time.time(),
        )
        await asyncio.to_thread(self._database.put, row)
        return m.CreateSamplingSessionResponse(sampling_session_id=row.id)

    async def _finish_session(self, tenant: str, request: m.FinishSessionRequest) -> m.Acknowledged:
        await self._check_session(tenant, request.session_id)
        for run in [run for run in self._runs.values() if run.session_id == request.session_id]:
            promise = self._unload(tenant, m.UnloadModelRequest(model_id=run.run_id))
            while await self._futures.wait(tenant, promise.request_id, 60.0) is None:
                pass
            await self._keeper.drop_unnamed(run.run_id, tenant)
        for sampler_id in [s.id for s in self._samplers.values() if s.session_id == request.session_id]:
            del self._samplers[sampler_id]
        return m.Acknowledged()


def _check_new_name(name: str) -> None:
    uris.check_name(name, "path")
    if name.startswith(tables.UNNAMED_PREFIX):
        raise InvalidRequest(
            f"path: names beginning with {tables.UNNAMED_PREFIX!r} are the server's own; choose another"
        )
