"""The verbs for one base model, as the gateway and local mode call them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol import operations
from twinkle.protocol.codec import Encoded
from twinkle.protocol.errors import Conflict, InvalidRequest, ServerFault, Unavailable
from twinkle.protocol.types import LoraConfig
from twinkle.server.backends.protocol import DEFAULT_ALPHA, AdapterSpec, CustomLoss
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.config import LimitsSection
from twinkle.server.engine.adapters import AdapterJobs
from twinkle.server.engine.compaction import Compaction
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.engine.engine import Engine
from twinkle.server.engine.recovery import Recovery
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.samples import SampleRunner
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.scheduling.futures import FutureTable, new_request_id
from twinkle.server.scheduling.limits import RateLimit, check_fetched, check_room, check_runs
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import RunLog
from twinkle.server.scheduling.runs import Received, Run
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.scheduling.threads import Threads
from twinkle.server.service import accounts, queries, sessions, validation
from twinkle.server.service.checkpoint_queries import CheckpointDesk
from twinkle.server.service.chores import Chores
from twinkle.server.service.downloads import Downloads
from twinkle.server.service.losses import CustomLosses
from twinkle.server.service.metadata import check_metadata
from twinkle.server.service.presence import Presence
from twinkle.server.service.restart import Restart
from twinkle.server.service.results import Results
from twinkle.server.service.sampling_sessions import Samplers
from twinkle.server.service.session_desk import SessionDesk
from twinkle.server.store import tables
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database
from twinkle.server.store.journal import Journal
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.run_files import RunFiles
from twinkle.server.tokens import Download, Signer

log = logging.getLogger("twinkle.server")

DEFAULT_RANK = 32

# Full micro-batches in a tick: more would make next to nothing faster, and others wait longer for its end.
_TICK_BATCHES = 4
# How long a server that is told to end waits for the end of what is being computed.
_PATIENCE_SECONDS = 10.0


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
        model_path: Path | None = None,
        signer: Signer | None = None,
        run_files: RunFiles | None = None,
        snapshot_seconds: float | None = None,
        max_resident_adapter_bytes: int | None = None,
        open_journal: Callable[[], Journal] | None = None,
        limits: LimitsSection = LimitsSection(),  # noqa: B008 - frozen
        encodes: bool = True,
    ) -> None:
        """
        Args:
            model_name: an id of the base model. Clients may ask for it by any other, and are told its plain name.
            model_path: where its files are, for those who want its tokenizer.
            signer: makes addresses for downloads; without one they are files of this machine.
            run_files: for copies of live runs; without them all adapters stay on the worker, and are lost with it.
            snapshot_seconds: from a run's change to its copy; None if the worker can't be lost without this process.
            max_resident_adapter_bytes: None is what the worker says.
            open_journal: blocking; needs `run_files`. Without a journal, runs end with this process.
            encodes: whether results are sent; without that they are not kept for a poll that is repeated, either.
        """
        model_name = self._model_name = plain_name(model_name)
        self._limits = limits
        self._tokens = _rate_of_tokens(limits)
        self._open_journal = open_journal
        self._run_files = run_files
        self._worker = worker
        self._database = database
        self._signer = signer
        self._downloads = Downloads(files, database, model_path, signer)
        self._ledger = Ledger(database, model_name)
        self._threads = Threads()
        self._log = RunLog()
        self._futures = FutureTable(
            time.monotonic,
            self._log,
            keep_seconds=600.0 if encodes else 0.0,
            unfetched_bytes=limits.max_unfetched_bytes or math.inf,
            encodes=encodes,
        )
        self._scheduler = Scheduler(_TICK_BATCHES * worker.info.max_batch_tokens, worker.info.overhead_tokens)
        self._results = Results(self._futures, self._scheduler)
        sampler_adapters = SamplerAdapters(worker, max_resident_sampler_adapters)
        self._snapshots = Snapshots(worker, run_files, snapshot_seconds)
        budget = max_resident_adapter_bytes or worker.info.max_adapter_bytes
        self._residency = Residency(worker, self._snapshots, budget)
        self._live = LiveRuns(self._scheduler, self._futures, self._log, self._tokens)
        self._compaction = Compaction(self._live, self._futures, self._snapshots, self._log)
        self._saved = Checkpoints(files, database, self._ledger, limits, worker.info.export, signer)
        self._adapters = self._build_adapters(sampler_adapters)
        completions = CompletionLog()
        self._samples = self._build_samples(sampler_adapters, completions)
        self._samplers = Samplers(model_name, database, self._saved, completions)
        self._losses = CustomLosses(database)
        self._sessions = self._build_sessions()
        self._checkpoints = self._build_checkpoints()
        self._engine = self._build_engine(sampler_adapters)
        self.chores = self._build_chores()
        self._loop_task: asyncio.Task[None] | None = None

    def _build_adapters(self, sampler_adapters: SamplerAdapters) -> AdapterJobs:
        return AdapterJobs(
            self._live,
            self._scheduler,
            self._futures,
            self._worker,
            sampler_adapters,
            self._snapshots,
            self._residency,
            self._saved,
            self._database,
        )

    def _build_samples(self, sampler_adapters: SamplerAdapters, completions: CompletionLog) -> SampleRunner:
        return SampleRunner(
            self._futures,
            self._worker,
            sampler_adapters,
            self._saved,
            completions,
            self._ledger,
            self._tokens.charge,
        )

    def _build_checkpoints(self) -> CheckpointDesk:
        make = self._sessions.create
        return CheckpointDesk(self._saved, self._database, self._downloads, self._limits, make)

    def _build_sessions(self) -> SessionDesk:
        return SessionDesk(
            self._database,
            self._live,
            self._futures,
            self._saved,
            self._samples,
            self._samplers,
            self._losses,
            Presence(self._limits.max_client_silence_seconds),
            self._limits,
            self._threads.queries,
        )

    def _build_engine(self, sampler_adapters: SamplerAdapters) -> Engine:
        recovery = Recovery(self._worker, self._residency, sampler_adapters)
        return Engine(
            self._scheduler,
            self._futures,
            self._worker,
            self._adapters,
            self._snapshots,
            self._residency,
            recovery,
            self._ledger,
        )

    def _build_chores(self) -> Chores:
        return Chores(self._ledger, self._compaction, self._saved, self._sessions, self._live)

    def _restart(self, run_files: RunFiles) -> Restart:
        return Restart(
            self._live,
            self._scheduler,
            self._futures,
            self._worker,
            self._log,
            self._compaction,
            run_files,
            self._engine,
            self._saved,
            self._samples,
            self._samplers,
            self._losses,
            self._sessions,
        )

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin to work, and return when a training step and a sample have succeeded."""
        seconds = await warm_up(self._worker)
        self._scheduler.set_batching_window(seconds, self._worker.info.max_batch_tokens)
        if self._open_journal is not None and self._run_files is not None:
            await self._restart(self._run_files).go_on(self._open_journal)
        self._loop_task = asyncio.create_task(self._engine.run())
        self.chores.start()

    async def close(self) -> None:
        """Stop working; what is being written is written, and what is under way goes on with the next process."""
        is_idle = await self._stop_engine()
        await self.chores.close()
        # What comes of saves is still written down: the runs' snapshots have them behind them. Samples that are
        # stopped after that are drawn again by the next process.
        await self._saved.settle()
        self._log.close()
        await self._samples.close()
        # Between two calls, and with a journal, all runs are snapshotted: then nothing has to be computed again.
        is_kept = is_idle and not self._engine.has_failed and self._open_journal is not None
        await self._snapshots.close(self._live if is_kept else ())
        try:
            await self._ledger.flush()
        except Exception:
            log.exception("what was used last could not be written")
        await self._worker.close()
        self._threads.close()
        self._database.close()

    async def _stop_engine(self) -> bool:
        """Between two calls, if that comes soon; returns whether it did."""
        if self._loop_task is None:
            return False
        is_idle = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._engine.until_idle()
                is_idle = True
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        return is_idle

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if it can't work any more. (That a lost worker is being started anew is no such case.)
        """
        if self._loop_task is None or self._loop_task.done():
            raise RuntimeError("the engine's loop has ended")
        if self._engine.has_failed:
            raise RuntimeError("the model could not be started anew")

    async def ready(self) -> None:
        """
        Raises:
            Unavailable: if what is asked for now would have to wait: the model is being loaded, or tried for the first
                time, or its process has ended.
        """
        if self._loop_task is None:
            raise Unavailable("the model is not ready yet: a training step and a sample come first", 2.0)
        try:
            self.check()
            async with asyncio.timeout(0):  # what is there already is there at once
                await self._worker.available()
        except (RuntimeError, ServerFault) as error:
            raise Unavailable("the model's process has ended, and could not be started anew", 30.0) from error
        except TimeoutError as error:
            raise Unavailable("the model's process has ended, and is being started anew", 2.0) from error

    # ------------------------------------------------------------ operations

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise:
        """Accept an operation.

        Args:
            body: the bytes that it was decoded from, which the journal keeps; None if there are none.
            digest: as `operations.digest` makes it; None has it made here, and an empty one says that the request is
                never sent again.

        Raises:
            InvalidRequest, NotFound: if it can't be done; its `seq_id` is consumed.
            QuotaReached: if it would be a run too many.
            LimitReached, Unavailable: if it can't be taken now; sent again it may be.
        """
        known = operations.digest(request) if digest is None else digest
        promise = await self._submit(tenant, Received(request, body, known))
        await self._log.wait_durable()
        return promise

    async def _submit(self, tenant: str, received: Received) -> m.Promise:
        match received.request:
            case m.CreateModelRequest() as request:
                return await self._create_run(tenant, request, received)
            case m.LoadWeightsRequest(model_id=None) as request:
                return await self._create_run_from_checkpoint(tenant, request, received)
            case m.UnloadModelRequest() as request:
                return self._unload(tenant, request, received)
            case m.SampleRequest() as request:
                return await self._begin_sample(tenant, request, received)
            case m.CreateCustomLossRequest() as request:
                return await self._create_custom_loss(tenant, request, received)
            case m.ForwardBackwardRequest() as request:
                await self._losses.load(tenant, request)
                return self._submit_ordered(tenant, request, received)
            case request:
                return self._submit_ordered(tenant, request, received)

    def _submit_ordered(self, tenant: str, request: m.Ordered, received: Received) -> m.Promise:
        run = self._live.find(tenant, request.model_id)
        self._ledger.touch(run.run_id)
        self._sessions.heard_of(run.session_id)
        seq_id = request.seq_id
        if seq_id is None:
            raise InvalidRequest("seq_id: missing; number the requests of a run 1, 2, 3, ...")
        queue = run.queue
        if (first := queue.duplicate_of(seq_id, received)) is not None:
            return m.Promise(request_id=first, model_id=run.run_id)
        queue.check(seq_id)
        try:
            loss = self._losses.of(run, request)
            tokens = self._check(request, loss)
        except InvalidRequest:
            self._live.reject(run, seq_id)
            raise
        # All else that the run has queued waits for the next one, so that is let in.
        self._check_limits(tenant, tokens, always_room=seq_id == queue.next_id)
        return self._live.enqueue(run, seq_id, received, tokens, loss)

    def _check_limits(self, tenant: str, tokens: int, always_room: bool = False) -> None:
        """
        Raises:
            LimitReached: if a request of so many tokens can't be queued now.
        """
        check_fetched(self._limits, self._futures, tenant)
        if not always_room:
            check_room(self._limits, self._futures, tenant, tokens)
        if tokens:
            self._tokens.check(tenant)

    def _check(self, request: m.Ordered, loss: CustomLoss | None) -> int:
        """Validate a request on a run; returns its cost in tokens."""
        if isinstance(request, m.ForwardBackwardRequest):
            return validation.check_pass(request, self._worker.info, self._worker.loss_fns, loss)
        limits = self._limits
        validation.check_on_run(request, limits.max_checkpoint_ttl_seconds, limits.max_metadata_bytes)
        return 0

    def _unload(self, tenant: str, request: m.UnloadModelRequest, received: Received) -> m.Promise:
        run = self._live.find(tenant, request.model_id)
        if request.seq_id is None:
            return self._live.enqueue_last(run, request)
        queue = run.queue
        if (first := queue.duplicate_of(request.seq_id, received)) is not None:
            return m.Promise(request_id=first, model_id=run.run_id)
        queue.check(request.seq_id)
        return self._live.enqueue(run, request.seq_id, received)

    # ------------------------------------------------------------ runs

    async def _create_run(self, tenant: str, request: m.CreateModelRequest, received: Received) -> m.Promise:
        validation.check_base_model(request.base_model, self._model_name)
        config = request.lora_config or LoraConfig(rank=DEFAULT_RANK)
        validation.check_lora_config(config, self._worker.info)
        validation.check_optimizer(request.optimizer_config, "optimizer_config.type")
        spec = AdapterSpec(
            rank=config.rank,
            alpha=config.alpha if config.alpha is not None else DEFAULT_ALPHA,
            seed=config.seed if config.seed is not None else secrets.randbits(63),
            **validation.trainable_flags(config, self._worker.info),
        )
        return await self._begin_run(
            tenant, request.session_id, request.model_seq_id, spec, request, received
        )

    async def _create_run_from_checkpoint(
        self, tenant: str, request: m.LoadWeightsRequest, received: Received
    ) -> m.Promise:
        if request.session_id is None or request.model_seq_id is None:
            raise InvalidRequest(
                "model_id: missing; name a run, or session_id and model_seq_id for a new one"
            )
        validation.check_optimizer(request.optimizer_config, "optimizer_config.type")
        checkpoint = await self._saved.find(tenant, request.path, token=request.weights_access_token)
        await self._saved.audit(tenant, "checkpoint_read", checkpoint.uri, purpose="load")
        validation.check_base_model(
            checkpoint.base_model, self._model_name, "path: the checkpoint's base model"
        )
        # Shape and scale come from the files, so that one who edited the row can't make them disagree.
        spec = (await self._saved.read(checkpoint.uri)).spec
        return await self._begin_run(
            tenant, request.session_id, request.model_seq_id, spec, request, received
        )

    async def _begin_run(
        self,
        tenant: str,
        session_id: str,
        model_seq_id: int,
        spec: AdapterSpec,
        request: m.CreateModelRequest | m.LoadWeightsRequest,
        received: Received,
    ) -> m.Promise:
        check_metadata(request.user_metadata, self._limits.max_metadata_bytes)
        await sessions.find_open(self._database, tenant, session_id)
        self._live.check_not_lost(tenant, f"{session_id}:train:{model_seq_id}")
        run = Run(f"{session_id}:train:{model_seq_id}", tenant, session_id, self._model_name, spec)
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
        self._sessions.heard_of(session_id)
        if run.run_id not in self._live:
            self._check_limits(tenant, 0)
            check_runs(self._limits, [other.tenant for other in self._live], tenant)
            await asyncio.to_thread(self._database.put, row)
        if (first := self._live.get(run.run_id)) is not None:  # before, or meanwhile
            return m.Promise(
                request_id=self._first_of_run(first, request.model_seq_id, received), model_id=run.run_id
            )
        return self._live.begin(run, received)

    def _first_of_run(self, run: Run, model_seq_id: int | None, received: Received) -> str:
        """
        Raises:
            Conflict: if the run was begun by a request that asks for something else.
            InvalidRequest: if that was of another kind, or so long ago that nothing of it is known any more.
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
                f"model_seq_id: {model_seq_id} was used before in this session, for run {run.run_id}, which "
                "takes requests; another run needs the next number"
            )
        return first

    # ------------------------------------------------------------ samples and losses

    async def _begin_sample(self, tenant: str, request: m.SampleRequest, received: Received) -> m.Promise:
        sampler = await self._samplers.find(tenant, request.sampling_session_id)
        self._sessions.heard_of(sampler.session_id)
        validation.check_sample(request, self._worker.info)
        targets = validation.target_tokens(request, self._worker.info)
        if (first := self._samples.first_of(request, received.digest)) is not None:
            return first
        self._check_limits(tenant, request.prompt.length)
        request_id = new_request_id()
        self._log.accepted_on_no_run(request_id, tenant, request.seq_id, request, received.body)
        self._tokens.charge(tenant, request.prompt.length)
        self._futures.create(tenant, request_id=request_id, tokens=request.prompt.length)
        return self._samples.begin(sampler, request, request_id, received.digest, targets)

    async def _create_custom_loss(
        self, tenant: str, request: m.CreateCustomLossRequest, received: Received
    ) -> m.Promise:
        await sessions.find_open(self._database, tenant, request.session_id)
        loss_id = await self._losses.create(tenant, request, self._worker.loss_fns)
        request_id = new_request_id()
        seq_id = request.custom_loss_seq_id
        self._log.accepted_on_no_run(request_id, tenant, seq_id, request, received.body)
        self._futures.create(tenant, request_id=request_id)
        self._futures.complete(request_id, m.CreateCustomLossResponse(loss_id=loss_id))
        return m.Promise(request_id=request_id)

    # ------------------------------------------------------------ results and queries

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.TryAgain:
        """The result, or `TryAgain` after `timeout` seconds without one."""
        with self._waiting(tenant, request_id):
            return await self._results.retrieve(tenant, request_id, timeout)

    async def fetch(
        self, tenant: str, request_id: str, timeout: float, most_bytes: int | None = None
    ) -> Encoded | m.TryAgain | m.CompleteMetadata:
        """As `retrieve`, as it travels.

        Args:
            most_bytes: a larger result is announced by its size alone, and not fetched by that.
        """
        with self._waiting(tenant, request_id):
            return await self._results.fetch(tenant, request_id, timeout, most_bytes)

    def _waiting(self, tenant: str, request_id: str) -> AbstractContextManager[None]:
        """That a result is waited for keeps its session's client among those who are there."""
        return self._sessions.waiting(self._session_of(tenant, request_id))

    def _session_of(self, tenant: str, request_id: str) -> str | None:
        """Whose client waits for this result, if there is none yet."""
        run = self._futures.run_of(request_id)
        if run is None:
            return self._samples.session_of(tenant, request_id)
        return run.session_id if run.tenant == tenant and not run.has_ended else None

    async def ask(self, tenant: str, query: m.Query[Any]) -> Any:
        """Answer a query.

        Raises:
            InvalidRequest, NotFound: as fits.
        """
        match query:
            case m.GetServerCapabilities():
                return queries.capabilities(self._model_name, self._worker.info)
            case m.GetInfoRequest():
                run = self._live.find(tenant, query.model_id)
                return queries.run_info(run, self._worker.info)
            case m.CreateSamplingSessionRequest():
                return await self._samplers.create(tenant, query)
            case m.JoinSamplingSessionRequest():
                return await self._samplers.join(tenant, query)
            case m.RetrieveFuturesRequest():
                sampler = await self._samplers.find(tenant, query.target.sampling_session_id)
                with self._sessions.waiting(sampler.session_id):
                    return await self._samplers.ended_samples(tenant, query)
            case m.CancelFutureRequest():
                self._samples.cancel(tenant, query.request_id)
                return m.Acknowledged()
            case m.GetTokenizerUrls():
                validation.check_base_model(query.base_model, self._model_name)
                return await self._threads.downloads.run(tenant, lambda: self._downloads.tokenizer(tenant))
            case m.GetApiKey() | m.DeleteApiKey() | m.GetAuditLog() | m.GetUsage() | m.GetStorageUsage():
                await self._ledger.flush()
                return await accounts.answer(self._database, self._threads.queries, tenant, query)
            case (
                m.CreateSessionRequest()
                | m.SessionHeartbeatRequest()
                | m.FinishSessionRequest()
                | m.ListSessions()
                | m.GetSession()
                | m.SearchSessions()
                | m.AssignSessionProject()
                | m.ExportTrace()
            ):
                return await self._sessions.answer(tenant, query)
            case (
                m.WeightsInfoRequest()
                | m.CopyWeightsRequest()
                | m.DeleteCheckpoint()
                | m.PublishCheckpoint()
                | m.UnpublishCheckpoint()
                | m.SetCheckpointTtl()
                | m.GetCheckpointUrls()
                | m.GetCheckpointArchive()
            ):
                return await self._checkpoints.answer(tenant, query)
            case _:
                await self._ledger.flush()
                return await queries.answer(self._database, self._threads.queries, tenant, query)

    # ------------------------------------------------------------ downloads

    async def download_sizes(self, download: Download) -> dict[str, int]:
        """The files that a download gives, with their sizes in bytes.

        Raises:
            NotFound: if they are not there (any more).
        """
        return await self._threads.downloads.run(download.tenant, lambda: self._downloads.sizes(download))

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of one of those files."""
        return await self._threads.downloads.run(
            download.tenant, lambda: self._downloads.read(download, name, offset, size)
        )


def _rate_of_tokens(limits: LimitsSection) -> RateLimit:
    return RateLimit(
        "max_tokens_per_minute",
        limits.max_tokens_per_minute_per_tenant,
        limits.max_tokens_per_minute,
        60.0,
        time.monotonic,
    )
