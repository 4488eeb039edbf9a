"""An adapter's life: made, saved, handed to the sampler, loaded, released."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.lora.finite import check_finite
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.checkpoints.quota import CheckpointQuota
from twinkle.server.checkpoints.writes import Writes
from twinkle.server.config import LimitsSection
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job
from twinkle.server.store import tables
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.clock import SteadyClock
from twinkle.server.store.database import Database
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.patience import DatabaseGone, patiently

ReadCheckpoint: TypeAlias = tuple[CheckpointUri, AdapterState]
Save: TypeAlias = m.SaveWeightsRequest | m.SaveWeightsForSamplerRequest | m.SaveWeightsExternalRequest

_SWEEP_AT_ONCE = 100
# How long one waits for what an earlier process had not written yet: it comes among the first things that are done.
_EXPECTED_SECONDS = 60.0


class AdapterKeeper:
    """Runs the jobs that are not computation. Called by the engine, one job at a time; disks are written meanwhile.

    A save takes its copy of the adapter in order; the files are written while the engine goes on. What a load needs is
    read while the engine goes on with other runs, behind writes that are under way.
    """

    def __init__(
        self,
        runs: dict[str, LiveRun],
        futures: FutureTable,
        worker: WorkerPort,
        sampler_adapters: SamplerAdapters,
        snapshots: Snapshots,
        residency: Residency,
        files: CheckpointFiles,
        database: Database,
        forget_run: Callable[[str], None],
        ledger: Ledger,
        tenant_of_key: Callable[[str], str],
        limits: LimitsSection,
    ) -> None:
        """
        Args:
            runs: the live runs; who owns them adds and removes.
            forget_run: takes a run out of the live runs and the scheduler.
            tenant_of_key: who gave an access token away.
        """
        self._runs = runs
        self._futures = futures
        self._worker = worker
        self._sampler_adapters = sampler_adapters
        self._snapshots = snapshots
        self._residency = residency
        self._files = files
        self._database = database
        self._forget_run = forget_run
        self._ledger = ledger
        self._tenant_of_key = tenant_of_key
        self._steady_clock = SteadyClock()
        self._limits = limits
        self._quota = CheckpointQuota(database, limits)
        self._writes = Writes()
        self._drops: dict[asyncio.Task[None], str] = {}  # with the run that each is of
        self._expected: dict[
            str, asyncio.Event
        ] = {}  # checkpoints that an earlier process had not written yet

    # ------------------------------------------------------------ begin and end

    async def create(self, job: Job) -> None:
        try:
            await self._residency.bring_in([job.run_id])
            await self._worker.add_adapter(job.run_id, self._runs[job.run_id].spec)
        except WorkerLost:
            raise  # the engine runs the job again
        except BaseException:
            self._forget_run(job.run_id)
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
        self._forget_run(job.run_id)
        self._futures.complete(job.request_id, m.UnloadModelResponse(model_id=job.run_id))

    # ------------------------------------------------------------ save

    async def save(self, job: Job, request: m.SaveWeightsRequest) -> None:
        uri = CheckpointUri(request.path, job.run_id, "weights")
        state = await self._export(job.run_id, with_optimizer=True)
        result = m.SaveWeightsResponse(path=str(uri))
        self._complete_when_written(job, uri, state, request, lambda _size: result)

    async def save_for_sampler(self, job: Job, request: m.SaveWeightsForSamplerRequest) -> None:
        if request.path is None:
            await self._save_unnamed(job, request)
            return
        uri = CheckpointUri(request.path, job.run_id, "sampler_weights")
        state = await self._export(job.run_id, with_optimizer=False)
        result = m.SaveWeightsForSamplerResponse(path=str(uri))
        self._complete_when_written(job, uri, state, request, lambda _size: result)

    async def save_external(self, job: Job, request: m.SaveWeightsExternalRequest) -> None:
        uri = CheckpointUri(request.path, job.run_id, "external_weights")
        state = await self._export(job.run_id, with_optimizer=False)
        self._complete_when_written(
            job,
            uri,
            state,
            request,
            lambda size: m.SaveWeightsExternalResponse(path=str(uri), size_bytes=size),
        )

    async def _save_unnamed(self, job: Job, request: m.SaveWeightsForSamplerRequest) -> None:
        run = self._runs[job.run_id]
        sampler_id = f"{run.session_id}:sample:{request.sampling_session_seq_id}"
        uri = _unnamed(job.run_id, job.seq_id)
        row = tables.SamplingSession(
            id=sampler_id,
            tenant=run.tenant,
            session_id=run.session_id,
            base_model=run.base_model,
            model_path=str(uri),
            created_at=time.time(),
        )
        # In memory first: sampling can begin. The files follow, so that the adapter may leave the sampler later.
        state = await self._export(job.run_id, with_optimizer=False)
        await self._sampler_adapters.publish(job.run_id, str(uri))

        async def write_and_release() -> None:
            try:
                await patiently(lambda: self._database.put(row))
                # What an earlier process answered is done once more until the files are there.
                self._futures.complete_for_now(
                    job.request_id, m.SaveWeightsForSamplerResponse(sampling_session_id=sampler_id)
                )
                await self._write(job, uri, state, run, request)
            except Exception as error:  # it stays pinned in the sampler, where it works
                self._futures.complete(job.request_id, to_failure(error, f"writing {uri}"))
            else:
                self._futures.complete_for_good(job.request_id)
                await self._sampler_adapters.release(str(uri))
                self._drop_behind(run)

        self._writes.begin(uri, run.tenant, write_and_release())
        self._no_longer_expected(uri)

    def expect_unnamed(self, run_id: str, seq_id: int) -> None:
        """A snapshot for the sampler that an earlier process had not written will be: who asks for it is to wait."""
        self._expected[str(_unnamed(run_id, seq_id))] = asyncio.Event()

    async def arrived(self, uri: CheckpointUri) -> None:
        """Wait for a checkpoint that is expected."""
        if (expected := self._expected.get(str(uri))) is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(expected.wait(), _EXPECTED_SECONDS)

    def _no_longer_expected(self, uri: CheckpointUri) -> None:
        event = self._expected.pop(str(uri), None)
        if event is not None:
            event.set()

    async def _export(self, run_id: str, with_optimizer: bool) -> AdapterState:
        await self._residency.bring_in([run_id])
        return await self._worker.export_adapter(run_id, with_optimizer)

    async def _is_new(self, job: Job, uri: CheckpointUri, overwrite: bool) -> bool:
        """Whether it is one more checkpoint, and not one in the place of another.

        Raises:
            InvalidRequest: if there is a checkpoint of that name, and it is not to be replaced.
        """
        row = await patiently(lambda: self._database.checkpoint_row(uri))
        if row is None:
            return True
        # One whose time is over gives its name away, unless it only looks like that.
        is_over = row.expires_at is not None and row.expires_at <= time.time()
        if is_over and not self._steady_clock.has_leapt():
            return True
        was_written_for_this_job = row.request_id == job.request_id  # by an earlier process
        if overwrite or was_written_for_this_job:
            return False
        raise InvalidRequest(
            f"path: this run already has a checkpoint {uri.name!r}; choose another name, or pass overwrite=True"
        )

    def _complete_when_written(
        self,
        job: Job,
        uri: CheckpointUri,
        state: AdapterState,
        request: Save,
        result: Callable[[int], m.Result],
    ) -> None:
        """Check and write behind, since both may take long; `result` is told the size in bytes."""
        run = self._runs[job.run_id]
        overwrite = isinstance(request, m.SaveWeightsRequest) and request.overwrite

        async def write_and_complete() -> None:
            try:
                await asyncio.to_thread(check_finite, state, is_saved=False)
                counts = await self._is_new(job, uri, overwrite) and uri.name != tables.RELEASED_NAME
                place = self._quota.place_for(job.tenant, uri, state.nbytes)
                async with place if counts else contextlib.nullcontext():
                    size = await self._write(job, uri, state, run, request)
            except Exception as error:
                self._futures.complete(job.request_id, to_failure(error, f"saving {uri}"))
            else:
                self._futures.complete(job.request_id, result(size))

        self._writes.begin(uri, run.tenant, write_and_complete())

    async def _write(
        self, job: Job, uri: CheckpointUri, state: AdapterState, run: LiveRun, request: Save
    ) -> int:
        """Files first, then the row; returns the size in bytes."""
        facts = self._worker.info.export
        is_external = isinstance(request, m.SaveWeightsExternalRequest)
        recipients = (request.age_encryption_recipients or ()) if is_external else ()
        size = await patiently(lambda: self._files.write(uri, state, run.base_model, facts, recipients))
        now = time.time()
        row = tables.Checkpoint(
            run_id=run.run_id,
            kind=uri.kind,
            name=uri.name,
            tenant=run.tenant,
            base_model=run.base_model,
            created_at=now,
            expires_at=self.expiry(request.ttl_seconds, now),
            size_bytes=size,
            rank=run.spec.rank,
            train_attn=run.spec.train_attn,
            train_mlp=run.spec.train_mlp,
            train_unembed=run.spec.train_unembed,
            public=False,
            request_id=job.request_id,
            user_metadata=None if is_external else request.user_metadata,
        )
        await patiently(lambda: self._database.put_checkpoint(row))
        if not uri.name.startswith(tables.UNNAMED_PREFIX):
            self._ledger.record(run.tenant, run.session_id, "checkpoint", 1)
            await self.audit(run.tenant, "checkpoint_create", uri)
        return size

    def expiry(self, ttl_seconds: int | None, now: float) -> float | None:
        """When a checkpoint ends that is to be kept for so long, or as long as may be; None is never."""
        seconds = ttl_seconds or self._limits.max_checkpoint_ttl_seconds
        return now + seconds if seconds else None

    async def settled(self, run_id: str) -> None:
        """Wait until everything is written that a run's requests have begun to write."""
        await self._writes.of_run(run_id)

    async def settle(self) -> None:
        """Wait until everything that is being written is written."""
        await self._writes.all()
        while self._drops:
            await asyncio.wait(set(self._drops))

    # ------------------------------------------------------------ load

    async def read_for(self, job: Job, request: m.LoadWeightsRequest) -> ReadCheckpoint:
        """What a load is to put in place; it may be long in coming, from a disk that is slow or a database that is
        locked.

        Raises:
            InvalidRequest, NotFound: if there is nothing that could be loaded.
        """
        checkpoint = await self.find(job.tenant, request.path, token=request.weights_access_token)
        self._check_base_model(checkpoint, job.run_id)
        return checkpoint.uri, await self.read(checkpoint.uri, with_optimizer=request.optimizer)

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
                self._forget_run(job.run_id)
            raise
        if is_new_run:
            self._begin(job.run_id)
        await self._snapshots.loaded(job, state)
        self._futures.complete(job.request_id, m.LoadWeightsResponse(path=str(uri), model_id=job.run_id))

    def _check_base_model(self, checkpoint: tables.Checkpoint, run_id: str) -> None:
        """Another base model may have layers of the same shapes: only its name tells."""
        ours = self._runs[run_id].base_model
        if plain_name(checkpoint.base_model) != ours:
            raise InvalidRequest(
                f"path: the checkpoint was trained on {checkpoint.base_model!r}, and can't be loaded into a run on "
                f"{ours!r}"
            )

    async def find(
        self, tenant: str, path: str, field: str = "path", token: str | None = None
    ) -> tables.Checkpoint:
        """The checkpoint that a tenant means by `path`, its own or a published one; one that is being written is
        waited for.

        Args:
            token: another tenant's key, in whose name to look.

        Raises:
            InvalidRequest: if `path` names no checkpoint.
            NotFound: if there is none of that name, or it is another tenant's.
        """
        uri = uris.parse(path, field)
        await self.arrived(uri)
        reader = tenant if token is None else self._tenant_of_key(token)
        await self._writes.of(uri, reader)
        row = await self._row(reader, uri)
        # Whether another tenant writes is told only of what it has published.
        if row is not None and row.tenant != reader and await self._writes.of_exactly(row.uri):
            row = await self._row(reader, uri)
        if row is None and uri.name.startswith(tables.UNNAMED_PREFIX):
            raise NotFound(
                f"{field}: the weights that this was made of are gone; of each run the newest "
                f"{self._limits.max_sampler_snapshots_per_run} are kept (limits.max_sampler_snapshots_per_run), until "
                "its session ends: save with a name what is to stay"
            )
        if row is None:
            raise NotFound(
                f"{field}: there is no checkpoint {path!r}; list_checkpoints shows those that there are"
            )
        return row

    async def _row(self, reader: str, uri: CheckpointUri) -> tables.Checkpoint | None:
        return await patiently(lambda: self._database.checkpoint(reader, uri, time.time(), or_public=True))

    async def read(self, uri: CheckpointUri, with_optimizer: bool = False) -> AdapterState:
        return await asyncio.to_thread(self._files.read, uri, with_optimizer)

    # ------------------------------------------------------------ look after what is saved

    async def find_own(self, tenant: str, uri: CheckpointUri) -> tables.Checkpoint:
        """The checkpoint, if it is the tenant's own.

        Raises:
            NotFound: if there is none of that name, or it is another tenant's.
        """
        row = await self.find(tenant, str(uri))
        if row.tenant != tenant:
            raise NotFound(f"{uri} is another tenant's: it can be read, and not changed")
        return row

    async def copy(
        self, source: tables.Checkpoint, run: tables.Run, expires_at: float | None
    ) -> tables.Checkpoint:
        """A copy of a checkpoint under another run, which belongs to nobody live.

        Raises:
            QuotaReached: if it would be one too many.
        """
        uri = CheckpointUri(source.name, run.id, source.uri.kind)
        async with self._quota.place_for(run.tenant, uri, source.size_bytes):
            await asyncio.to_thread(self._database.put, run)
            await asyncio.to_thread(self._files.copy, source.uri, uri)
            columns = {
                column.key: getattr(source, column.key) for column in tables.Checkpoint.__table__.columns
            }
            changed = {"run_id": run.id, "tenant": run.tenant, "created_at": time.time(), "public": False}
            row = tables.Checkpoint(**{**columns, **changed, "expires_at": expires_at})
            await asyncio.to_thread(self._database.put_checkpoint, row)
        return row

    def _drop_behind(self, run: LiveRun) -> None:
        """Not within what writes a snapshot: that may be one of those that are to go."""
        task = asyncio.create_task(self._drop_old_unnamed(run))
        self._drops[task] = run.run_id
        task.add_done_callback(lambda done: self._drops.pop(done, None))

    async def _drop_old_unnamed(self, run: LiveRun) -> None:
        """Delete the oldest of a run's unnamed snapshots that are more than a run may leave."""
        try:
            rows = await patiently(lambda: self._database.unnamed_checkpoints(run.tenant, run.run_id))
            # By their place in the run's order, in which they need not have been written.
            rows.sort(key=lambda row: int(row.name.removeprefix(tables.UNNAMED_PREFIX)))
            for row in rows[: -self._limits.max_sampler_snapshots_per_run]:
                await self.delete(row)
        except Exception as error:  # the next snapshot is another chance
            to_failure(error, f"deleting old snapshots of {run.run_id}")

    async def drop_unnamed(self, run_id: str, tenant: str) -> None:
        """Delete a run's unnamed snapshots: no one is left to sample them."""
        await self.settled(run_id)
        while own := {drop for drop, of_run in self._drops.items() if of_run == run_id}:
            await asyncio.wait(own)
        rows = await asyncio.to_thread(self._database.unnamed_checkpoints, tenant, run_id)
        for row in rows:
            await self.delete(row)

    async def delete(self, row: tables.Checkpoint) -> None:
        """Delete a checkpoint, unless it has been written anew since `row` was read."""

        async def delete_row_and_files() -> None:
            now = await asyncio.to_thread(self._database.checkpoint_row, row.uri)
            if now is None or (now.created_at, now.expires_at) != (row.created_at, row.expires_at):
                return
            await asyncio.to_thread(self._database.delete_checkpoint, row.tenant, row.uri)
            await asyncio.to_thread(self._files.delete, row.uri)

        await self._writes.begin(row.uri, row.tenant, delete_row_and_files())

    async def sweep(self) -> None:
        """Delete checkpoints whose time is over, if the clock is sure of that."""
        now = self._steady_clock.now()
        if now is None:
            return
        try:
            rows = await asyncio.to_thread(self._database.expired_checkpoints, now, _SWEEP_AT_ONCE)
        except DatabaseGone:
            return  # the database itself has said so, once
        for row in rows:
            await self.delete(row)

    async def audit(self, tenant: str, event: str, uri: CheckpointUri, **more: object) -> None:
        """Note what was done to a checkpoint."""
        details = {"tinker_path": str(uri), "model_id": uri.run_id, **more}
        entry = tables.Audit(tenant=tenant, time=time.time(), event=event, details=details)
        await patiently(lambda: self._database.put(entry))


def _unnamed(run_id: str, seq_id: int) -> CheckpointUri:
    return CheckpointUri(f"{tables.UNNAMED_PREFIX}{seq_id}", run_id, "sampler_weights")
