"""Saved checkpoints, with their files, rows and quotas: writing, finding, reading, copying, deleting."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from twinkle.protocol import uris
from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.lora.finite import check_finite
from twinkle.server.backends.protocol import AdapterState, ExportFacts
from twinkle.server.checkpoints.quota import CheckpointQuota
from twinkle.server.checkpoints.writes import Writes
from twinkle.server.config import LimitsSection
from twinkle.server.logs import about
from twinkle.server.scheduling.runs import Run
from twinkle.server.store import tables
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.clock import SteadyClock
from twinkle.server.store.database import Database
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.retry import StoreGone, retry_while_unavailable
from twinkle.server.tokens import Signer, tenant_of_access_token

log = logging.getLogger("twinkle.server")

_SWEEP_AT_ONCE = 100
# How long a reader waits for weights that an earlier process had accepted but not yet written: they are among the
# first things that a restarted server does.
_EXPECTED_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Save:
    """A checkpoint to be written.

    Attributes:
        request_id: a save repeated after a crash may replace what it has written itself.
        recipients: age public keys; the files are encrypted to them.
    """

    uri: CheckpointUri
    tenant: str
    session_id: str
    base_model: str
    request_id: str
    ttl_seconds: int | None
    user_metadata: dict[str, Any] | None = None
    recipients: Sequence[str] = ()
    overwrite: bool = False


def unnamed_uri(run_id: str, seq_id: int) -> CheckpointUri:
    """Where the ephemeral sampler weights of a run's request are."""
    return CheckpointUri(f"{tables.UNNAMED_PREFIX}{seq_id}", run_id, "sampler_weights")


class Checkpoints:
    """Single-threaded: called on one event loop. Files are read and written in threads."""

    def __init__(
        self,
        files: CheckpointFiles,
        database: Database,
        ledger: Ledger,
        limits: LimitsSection,
        facts: ExportFacts,
        signer: Signer | None,
    ) -> None:
        """
        Args:
            facts: of the base model, for the adapters' configuration files.
            signer: reads access tokens that this server signed; None if it signs none.
        """
        self._files = files
        self._database = database
        self._ledger = ledger
        self._limits = limits
        self._facts = facts
        self._signer = signer
        self._steady_clock = SteadyClock()
        self._quota = CheckpointQuota(database, limits)
        self._writes = Writes()
        self._trims: set[asyncio.Task[None]] = set()
        # Ephemeral weights that an earlier process had not yet written, by URI.
        self._expected: dict[str, asyncio.Event] = {}

    # ------------------------------------------------------------ save

    def begin(self, run: Run, uri: CheckpointUri, work: Coroutine[None, None, None]) -> None:
        """Run `work`, which writes `uri` of the run, in the background; `find` waits for it from now on."""
        run.add_write(self._writes.begin(uri, run.tenant, work))
        if (expected := self._expected.pop(str(uri), None)) is not None:
            expected.set()

    async def save(self, save: Save, state: AdapterState) -> int:
        """Check and write a named checkpoint; returns its size in bytes.

        Raises:
            InvalidRequest: if its numbers are not finite, or the name is taken.
            QuotaReached: if there would be too many.
        """
        await asyncio.to_thread(check_finite, state, is_saved=False)
        counts = await self._is_new(save) and save.uri.name != tables.RELEASED_NAME
        place = self._quota.place_for(save.tenant, save.uri, state.nbytes)
        async with place if counts else contextlib.nullcontext():
            size = await self.write(save, state)
        self._ledger.record(save.tenant, save.session_id, "checkpoint", 1)
        await self.audit(save.tenant, "checkpoint_create", save.uri)
        log.info("saved %s, %d bytes", save.uri, size, extra=about(save.uri.run_id, save.tenant))
        return size

    async def _is_new(self, save: Save) -> bool:
        """Whether this adds a checkpoint rather than replacing one.

        Raises:
            InvalidRequest: if there is a checkpoint of that name, and it must not be replaced.
        """
        row = await retry_while_unavailable(lambda: self._database.checkpoint_row(save.uri))
        if row is None:
            return True
        # An expired checkpoint frees its name, unless the clock can't be trusted.
        is_over = row.expires_at is not None and row.expires_at <= time.time()
        if is_over and not self._steady_clock.has_leapt():
            return True
        was_written_for_this_job = row.request_id == save.request_id  # by an earlier process
        if save.overwrite or was_written_for_this_job:
            return False
        raise InvalidRequest(
            f"path: this run already has a checkpoint {save.uri.name!r}; choose another name, or pass overwrite=True"
        )

    async def write(self, save: Save, state: AdapterState) -> int:
        """Write files, then the row, without checks; returns the size in bytes."""
        size = await retry_while_unavailable(
            lambda: self._files.write(save.uri, state, save.base_model, self._facts, save.recipients)
        )
        now = time.time()
        row = tables.Checkpoint(
            run_id=save.uri.run_id,
            kind=save.uri.kind,
            name=save.uri.name,
            tenant=save.tenant,
            base_model=save.base_model,
            created_at=now,
            expires_at=self.expiry(save.ttl_seconds, now),
            size_bytes=size,
            rank=state.spec.rank,
            train_attn=state.spec.train_attn,
            train_mlp=state.spec.train_mlp,
            train_unembed=state.spec.train_unembed,
            public=False,
            request_id=save.request_id,
            user_metadata=save.user_metadata,
        )
        await retry_while_unavailable(lambda: self._database.put_checkpoint(row))
        return size

    def expiry(self, ttl_seconds: int | None, now: float) -> float | None:
        """When a checkpoint with this time to live expires; None: never. Default: as late as the limits allow."""
        seconds = ttl_seconds or self._limits.max_checkpoint_ttl_seconds
        return now + seconds if seconds else None

    async def settle(self) -> None:
        """Wait until nothing is being written or deleted."""
        await self._writes.all()
        while self._trims:
            await asyncio.wait(set(self._trims))

    # ------------------------------------------------------------ find and read

    async def find(
        self, tenant: str, path: str, field: str = "path", token: str | None = None
    ) -> tables.Checkpoint:
        """The checkpoint that a tenant means by `path`, its own or a published one; waits for one being written.

        Args:
            token: another tenant's key, to look on its behalf.

        Raises:
            InvalidRequest: if `path` names no checkpoint.
            NotFound: if there is none of that name, or it is another tenant's.
        """
        uri = uris.parse(path, field)
        await self.arrived(str(uri))
        reader = tenant if token is None else tenant_of_access_token(token, self._signer)
        await self._writes.of(uri, reader)
        row = await self._row(reader, uri)
        # Another tenant's writes are waited for only if it published the checkpoint: otherwise the wait would leak it.
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
        return await retry_while_unavailable(
            lambda: self._database.checkpoint(reader, uri, time.time(), or_public=True)
        )

    async def find_own(self, tenant: str, uri: CheckpointUri) -> tables.Checkpoint:
        """The checkpoint, if it is the tenant's own.

        Raises:
            NotFound: if there is none of that name, or it is another tenant's.
        """
        row = await self.find(tenant, str(uri))
        if row.tenant != tenant:
            raise NotFound(f"{uri} is another tenant's: it can be read, and not changed")
        return row

    async def read(self, uri: CheckpointUri, with_optimizer: bool = False) -> AdapterState:
        return await retry_while_unavailable(lambda: self._files.read(uri, with_optimizer))

    # ------------------------------------------------------------ copy and delete

    async def copy(
        self, source: tables.Checkpoint, run: tables.Run, expires_at: float | None
    ) -> tables.Checkpoint:
        """Copy a checkpoint to another run, which is not live.

        Raises:
            QuotaReached: if there would be too many.
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

    async def delete(self, row: tables.Checkpoint) -> None:
        """Delete a checkpoint, unless it has been overwritten since `row` was read."""

        async def delete_row_and_files() -> None:
            now = await asyncio.to_thread(self._database.checkpoint_row, row.uri)
            if now is None or (now.created_at, now.expires_at) != (row.created_at, row.expires_at):
                return
            await asyncio.to_thread(self._database.delete_checkpoint, row.tenant, row.uri)
            await retry_while_unavailable(lambda: self._files.delete(row.uri))

        await self._writes.begin(row.uri, row.tenant, delete_row_and_files())

    async def check_reachable(self, row: tables.Checkpoint) -> None:
        """Before a checkpoint is deleted: files that can't be reached would stay without a row.

        Raises:
            FilesAway: if they can't be reached.
        """
        await asyncio.to_thread(self._files.is_there, row.uri)

    async def sweep(self) -> None:
        """Delete expired checkpoints, if the clock can be trusted."""
        now = self._steady_clock.now()
        if now is None:
            return
        try:
            for row in await asyncio.to_thread(self._database.expired_checkpoints, now, _SWEEP_AT_ONCE):
                await self.check_reachable(row)
                await self.delete(row)
        except StoreGone:
            return  # it has been logged once

    async def delete_leftovers(self) -> None:
        """Delete what processes that were killed had begun to write."""
        await asyncio.to_thread(self._files.delete_leftovers)

    async def audit(self, tenant: str, event: str, uri: CheckpointUri, **more: object) -> None:
        """Record in the audit log what was done to a checkpoint."""
        details = {"tinker_path": str(uri), "model_id": uri.run_id, **more}
        entry = tables.Audit(tenant=tenant, time=time.time(), event=event, details=details)
        await retry_while_unavailable(lambda: self._database.put(entry))

    # ------------------------------------------------------------ ephemeral sampler weights

    def expect_unnamed(self, run_id: str, seq_id: int) -> None:
        """An earlier process accepted these weights but had not written them: readers wait until the write begins."""
        self._expected[str(unnamed_uri(run_id, seq_id))] = asyncio.Event()

    async def arrived(self, path: str) -> None:
        """Wait for the checkpoint of this full name, if it is expected."""
        if (expected := self._expected.get(path)) is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(expected.wait(), _EXPECTED_SECONDS)

    async def put_sampler(self, save: Save, sampler_id: str) -> None:
        """Write the row of the sampling session for these weights."""
        row = tables.SamplingSession(
            id=sampler_id,
            tenant=save.tenant,
            session_id=save.session_id,
            base_model=save.base_model,
            model_path=str(save.uri),
            created_at=time.time(),
        )
        await retry_while_unavailable(lambda: self._database.put(row))

    def trim_unnamed(self, run: Run) -> None:
        """Delete, in the background, the oldest of a run's ephemeral weights beyond the number it may keep.

        In a task of its own, since the write that calls this may be one of those to be deleted.
        """
        task = asyncio.create_task(self._trim(run))
        run.add_write(task)
        self._trims.add(task)
        task.add_done_callback(self._trims.discard)

    async def _trim(self, run: Run) -> None:
        try:
            rows = await retry_while_unavailable(
                lambda: self._database.unnamed_checkpoints(run.tenant, run.run_id)
            )
            # In the run's order, which need not be the order in which they were written.
            rows.sort(key=lambda row: int(row.name.removeprefix(tables.UNNAMED_PREFIX)))
            for row in rows[: -self._limits.max_sampler_snapshots_per_run]:
                await self.delete(row)
        except Exception:  # the next save tries again
            log.exception("old sampler weights of run %s could not be deleted", run.run_id)

    async def drop_unnamed(self, run: Run) -> None:
        """Delete all of a run's ephemeral weights."""
        while run.writes:  # a finishing write may begin a trim
            await run.settled()
        rows = await asyncio.to_thread(self._database.unnamed_checkpoints, run.tenant, run.run_id)
        for row in rows:
            await self.delete(row)
