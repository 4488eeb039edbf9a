"""The composition root: the one file that knows all the parts and puts them together."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from twinkle.hub import plain_name
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.config import ServerConfig, StorageSection
from twinkle.server.engine.adapters import AdapterJobs
from twinkle.server.engine.compaction import Compaction
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.engine.engine import Engine
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.samples import SampleRunner
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.keys import KeyRing, with_auth_mode
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.leases import Leases
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import RunLog
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.service.downloads import Downloads
from twinkle.server.service.losses import CustomLosses
from twinkle.server.service.parts import Parts
from twinkle.server.service.service import Service
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database
from twinkle.server.store.files import Files, LocalFiles
from twinkle.server.store.journal import Journal
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.private import private_directory, tighten_if_there
from twinkle.server.store.run_files import RunFiles
from twinkle.server.store.sampler_cache import SamplerCache
from twinkle.server.tokens import Signer, new_secret, read_secret

# Full micro-batches in a tick: more would make next to nothing faster, and others wait longer for its end.
_TICK_BATCHES = 4


def build_signer(config: ServerConfig) -> Signer:
    """What signs this server's tokens. The secret is in a file beside the SQLite database; where the database has a
    server, it is in there, so that it is the same on all machines.
    """
    storage = config.storage
    private_directory(storage.directory)
    path = storage.directory / "secret"
    tighten_if_there(path)
    if not storage.is_on_database_server:
        return Signer(read_secret(path))
    database = Database(storage.url)
    try:
        # One that was in use here before stays valid.
        return Signer(database.secret("tokens", read_secret(path) if path.exists() else new_secret()))
    finally:
        database.close()


def build_keys(config: ServerConfig) -> KeyRing | None:
    """The accepted keys; None in open mode."""
    return KeyRing(Database(config.storage.url)) if with_auth_mode(config).auth.mode == "keys" else None


def build_service(
    config: ServerConfig,
    worker: WorkerPort,
    model_path: Path | None = None,
    signer: Signer | None = None,
    live: Path | None = None,
    engine: str | None = None,
) -> Service:
    """The service in front of a worker, with its store.

    Args:
        model_path: where the base model's files are.
        signer: makes addresses for downloads; without one they are files of this machine.
        live: directory of this server's live runs, which a restarted server continues. None keeps them only as long as
            this process lives, and the worker can't be lost without it.
        engine: its name among several.
    """
    storage = config.storage
    private_directory(storage.directory)
    return Service(
        build_parts(
            config,
            worker,
            RunFiles(_snapshot_files(storage, live)),
            model_path=model_path,
            signer=signer,
            snapshot_seconds=storage.snapshot_seconds if live else None,
            open_journal=(lambda: Journal(live / "journal", storage.journal_flush)) if live else None,
            live_files=(lambda other: RunFiles(_snapshot_files(storage, other))) if live else None,
            encodes=live is not None,
            engine=engine,
        )
    )


def _snapshot_files(storage: StorageSection, live: Path | None) -> Files:
    """Where the snapshots of a server's runs are."""
    if live is None:
        return LocalFiles(storage.directory / "live" / f"process-{os.getpid()}" / "runs")
    if storage.shared_url is None:
        return LocalFiles(live / "runs")
    # The journal knows whose they are. Another machine's server may have the same port and model.
    private_directory(live)
    name = live / "name"
    if not name.exists():
        partial = live / f"name.{os.getpid()}"
        partial.write_text(f"{live.name}-{uuid.uuid4().hex}", encoding="ascii")
        os.replace(partial, name)
    return _open_root(storage).below(f"live/{name.read_text(encoding='ascii')}/runs")


def _open_root(storage: StorageSection) -> Files:
    if storage.shared_url is None:
        return LocalFiles(storage.directory)
    from twinkle.server.store.shared_files import open_shared

    return open_shared(storage.shared_url, storage.directory / "scratch")


def build_parts(
    config: ServerConfig,
    worker: WorkerPort,
    run_files: RunFiles,
    *,
    model_path: Path | None = None,
    signer: Signer | None = None,
    snapshot_seconds: float | None = None,
    open_journal: Callable[[], Journal] | None = None,
    live_files: Callable[[Path], RunFiles] | None = None,
    encodes: bool = True,
    engine: str | None = None,
) -> Parts:
    """The objects of one engine, each given those that it needs. Arguments: as in `Parts`, `Snapshots` and `RunLog`."""
    model, limits, info = config.model, config.limits, worker.info
    database = Database(config.storage.url)
    files = CheckpointFiles(_open_root(config.storage).below("checkpoints"))
    ledger = Ledger(database, plain_name(model.model_id))
    checkpoints = Checkpoints(files, database, ledger, limits, info.export, signer)
    run_log, tokens = RunLog(engine), _token_rate(config)
    futures = _build_futures(config, run_log, encodes)
    scheduler = Scheduler(
        _TICK_BATCHES * info.data_parallel_size * info.max_batch_tokens, info.overhead_tokens
    )
    snapshots = Snapshots(worker, run_files, snapshot_seconds)
    residency = Residency(worker, snapshots, model.max_resident_adapter_bytes or info.max_adapter_bytes)
    live = LiveRuns(scheduler, futures, run_log, tokens)
    sampler_adapters = SamplerAdapters(worker, config.sampler.max_resident_adapters)
    completions = CompletionLog()
    adapters = AdapterJobs(
        live, scheduler, futures, worker, sampler_adapters, snapshots, residency, checkpoints
    )
    return Parts(
        model_name=plain_name(model.model_id),
        limits=limits,
        worker=worker,
        database=database,
        ledger=ledger,
        downloads=Downloads(files, database, model_path, signer),
        tokens=tokens,
        futures=futures,
        scheduler=scheduler,
        leases=Leases(limits.max_client_silence_seconds),
        live=live,
        run_log=run_log,
        compaction=Compaction(live, futures, snapshots, run_log),
        run_files=run_files,
        snapshots=snapshots,
        residency=residency,
        checkpoints=checkpoints,
        samples=SampleRunner(futures, worker, sampler_adapters, checkpoints, completions, ledger, tokens),
        completions=completions,
        samplers=SamplerCache(database),
        losses=CustomLosses(database),
        engine=Engine(scheduler, futures, worker, adapters, snapshots, residency, sampler_adapters, ledger),
        open_journal=open_journal,
        live_files=live_files,
    )


def _build_futures(config: ServerConfig, run_log: RunLog, encodes: bool) -> FutureTable:
    # Who fetches in this process gets a result once: only a lost HTTP reply makes anybody ask again.
    keep_seconds, unfetched_bytes = 600.0 if encodes else 0.0, config.limits.max_unfetched_bytes or math.inf
    return FutureTable(
        time.monotonic, run_log, keep_seconds, unfetched_bytes=unfetched_bytes, encodes=encodes
    )


def _token_rate(config: ServerConfig) -> RateLimit:
    per_tenant, total = config.limits.max_tokens_per_minute_per_tenant, config.limits.max_tokens_per_minute
    return RateLimit("max_tokens_per_minute", per_tenant, total, 60.0, time.monotonic)


def live_directory(config: ServerConfig) -> Path:
    """Where a server's live runs are: by its port and model, since several servers may share a storage."""
    return config.storage.directory / "live" / config.server_name
