"""The composition root: the one file that knows all the parts and puts them together."""

from __future__ import annotations

import os
from pathlib import Path

from twinkle.server.config import ServerConfig
from twinkle.server.engine.evicted_files import EvictedFiles
from twinkle.server.engine.snapshots import SnapshotFiles
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.service.service import Service
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database
from twinkle.server.tokens import Signer, read_secret


def build_signer(config: ServerConfig) -> Signer:
    """What signs this server's tokens, with the secret that is kept beside its checkpoints."""
    config.storage.directory.mkdir(parents=True, exist_ok=True)
    return Signer(read_secret(config.storage.directory / "secret"))


def build_service(
    config: ServerConfig,
    worker: WorkerPort,
    model_path: Path | None = None,
    signer: Signer | None = None,
    snapshot_files: SnapshotFiles | None = None,
    evicted_files: EvictedFiles | None = None,
) -> Service:
    """The service in front of a worker, with its store.

    Args:
        model_path: where the base model's files are.
        signer: makes addresses for downloads; without one they are files of this machine.
        snapshot_files: see `build_snapshot_files`; None where the worker can't be lost without this process.
        evicted_files: see `build_evicted_files`; without them all adapters stay on the worker.
    """
    config.storage.directory.mkdir(parents=True, exist_ok=True)
    return Service(
        config.model.model_id,
        worker,
        Database(config.storage.url),
        CheckpointFiles(config.storage.directory / "checkpoints"),
        config.sampler.max_resident_adapters,
        model_path,
        signer,
        snapshot_files,
        config.storage.snapshot_seconds,
        evicted_files,
        config.model.max_resident_adapter_bytes,
    )


def build_snapshot_files(config: ServerConfig) -> SnapshotFiles:
    """Where snapshots of live runs go. By the port, since several servers of a machine may share a storage."""
    return SnapshotFiles(config.storage.directory / "snapshots" / str(config.server.port))


def build_evicted_files(config: ServerConfig, of_port: bool = True) -> EvictedFiles:
    """Where runs go whose adapters had to make room.

    Args:
        of_port: whether this is the server on the configured port; else it is this process's own place.
    """
    place = str(config.server.port) if of_port else f"local-{os.getpid()}"
    return EvictedFiles(config.storage.directory / "evicted" / place)
