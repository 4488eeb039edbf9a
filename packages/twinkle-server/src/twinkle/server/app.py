"""The composition root: the one file that knows all the parts and puts them together."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from twinkle.server.config import ServerConfig
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.keys import KeyRing, with_auth_mode
from twinkle.server.service.service import Service
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database
from twinkle.server.store.journal import Journal
from twinkle.server.store.private import private_directory, tighten_if_there
from twinkle.server.store.run_files import RunFiles
from twinkle.server.tokens import Signer, read_secret


def build_signer(config: ServerConfig) -> Signer:
    """What signs this server's tokens, with the secret that is kept beside its checkpoints."""
    private_directory(config.storage.directory)
    secret = config.storage.directory / "secret"
    tighten_if_there(secret)
    return Signer(read_secret(secret))


def build_keys(config: ServerConfig) -> KeyRing | None:
    """The keys that are let in; None in open mode."""
    return KeyRing(Database(config.storage.url)) if with_auth_mode(config).auth.mode == "keys" else None


def build_service(
    config: ServerConfig,
    worker: WorkerPort,
    model_path: Path | None = None,
    signer: Signer | None = None,
    live: Path | None = None,
) -> Service:
    """The service in front of a worker, with its store.

    Args:
        model_path: where the base model's files are.
        signer: makes addresses for downloads; without one they are files of this machine.
        live: directory of this server's live runs, which go on from there when it starts anew. None keeps them as long
            as this process is there, and the worker can't be lost without it.
    """
    storage = config.storage
    private_directory(storage.directory)
    place = live or storage.directory / "live" / f"process-{os.getpid()}"
    return Service(
        config.model.model_id,
        worker,
        Database(storage.url),
        CheckpointFiles(storage.directory / "checkpoints"),
        config.sampler.max_resident_adapters,
        model_path,
        signer,
        RunFiles(place / "runs"),
        storage.snapshot_seconds if live else None,
        config.model.max_resident_adapter_bytes,
        (lambda: Journal(live / "journal", storage.journal_flush)) if live else None,
        config.limits,
        encodes=live is not None,
    )


def live_directory(config: ServerConfig) -> Path:
    """Where a server's live runs are: by its port and model, since several servers may share a storage."""
    model = hashlib.sha256(config.model.model_id.encode()).hexdigest()[:12]
    return config.storage.directory / "live" / f"{config.server.port}-{model}"
