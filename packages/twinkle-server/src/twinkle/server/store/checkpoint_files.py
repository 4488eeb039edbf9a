"""Checkpoints as directories in PEFT layout, with optimizer state and a manifest beside it.

    ROOT/RUN/KIND/NAME/adapter_config.json, adapter_model.safetensors    what PEFT loads
                       optimizer.safetensors                             AdamW's moments, if saved
                       README.md                                         description
                       NAME.age                                          in place of each of these, if encrypted
                       manifest.json                                     sha256 and size of each file

A checkpoint is written under a temporary name and renamed when it is complete, so a visible one is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinkle.protocol.errors import InvalidRequest, ServerFault, words_of
from twinkle.protocol.uris import CheckpointUri, check_name
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import PLAIN_MODEL, AdapterState, ExportFacts
from twinkle.server.store.encryption import SUFFIX, encrypt_files

MANIFEST = "manifest.json"


class CheckpointFiles:
    """The directory of checkpoints. Names have been checked by `uris`: none of them is a path."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # A directory can't be renamed over another: for a moment the replaced one is gone and the new one not yet
        # there. The lock is held meanwhile, so that nobody finds files missing.
        self._replacing = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)

    def path(self, uri: CheckpointUri) -> Path:
        assert uri.run_id is not None and uri.kind is not None, (
            "bare names are looked up in the database first"
        )
        return self._root / uri.run_id / uri.kind / uri.name

    def write(
        self,
        uri: CheckpointUri,
        state: AdapterState,
        base_model: str,
        facts: ExportFacts = PLAIN_MODEL,
        recipients: Sequence[str] = (),
    ) -> int:
        """Write a checkpoint, replacing one of the same name.

        Args:
            base_model: how PEFT and tokenizers find the base model.
            facts: of the base model.
            recipients: age public keys to encrypt the files to; none: not encrypted.

        Returns:
            Its size in bytes.
        """
        target = self.path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{uri.name}.{uuid.uuid4().hex}.partial"
        try:
            partial.mkdir()
            peft_format.write(partial, state, base_model, facts)
            if recipients:
                encrypt_files(partial, recipients)
            size = _write_manifest(partial)
            self._replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return size

    def read(self, uri: CheckpointUri, with_optimizer: bool) -> AdapterState:
        """Read a checkpoint, after checking its files against the manifest.

        Raises:
            ServerFault: if a file is missing or has changed.
            InvalidRequest: if the optimizer's state is asked for but was not saved, or the files are encrypted.
        """
        directory = self.path(uri)
        _check_manifest(directory, uri)
        if (directory / (peft_format.WEIGHTS + SUFFIX)).is_file():
            raise InvalidRequest(f"{uri} is encrypted for whoever has its keys: the server can't read it")
        return peft_format.read(directory, with_optimizer)

    def copy(self, source: CheckpointUri, target: CheckpointUri) -> None:
        """Make a second checkpoint with the same content.

        Raises:
            ServerFault: if a file of the source is missing or has changed.
        """
        _check_manifest(self.path(source), source)
        place = self.path(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
        try:
            shutil.copytree(self.path(source), partial)
            self._replace(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def sizes(self, uri: CheckpointUri) -> dict[str, int]:
        """The checkpoint's files by name, with their sizes in bytes.

        Raises:
            ServerFault: if the manifest is missing or unreadable, or a file has the wrong size.
        """
        directory = self.path(uri)
        try:
            with self._replacing:
                manifest = _read_manifest(directory, uri)
                found = {name: (directory / name).stat().st_size for name in manifest}
            sizes = {name: int(entry["size_bytes"]) for name, entry in manifest.items()}
            wrong = [name for name, size in sizes.items() if found[name] != size]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise _incomplete(uri, error) from error
        if wrong:
            raise _incomplete(uri, ValueError(f"{', '.join(wrong)} is not as long as it was"))
        return sizes

    def digest(self, uri: CheckpointUri) -> str:
        """SHA-256 of the manifest, which has those of all files, so it differs between checkpoints.

        Raises:
            ServerFault: if the manifest is missing.
        """
        try:
            with self._replacing:
                return _sha256(self.path(uri) / MANIFEST)
        except OSError as error:
            raise _incomplete(uri, error) from error

    def delete(self, uri: CheckpointUri) -> None:
        shutil.rmtree(self.path(uri), ignore_errors=True)

    def _replace(self, partial: Path, target: Path) -> None:
        if not target.exists():
            os.rename(partial, target)
            return
        old = partial.with_suffix(".old")
        with self._replacing:
            os.rename(target, old)
            os.rename(partial, target)
        shutil.rmtree(old)


def _write_manifest(directory: Path) -> int:
    files = {path.name: path for path in sorted(directory.iterdir())}
    entries = {
        name: {"sha256": _sha256(path), "size_bytes": path.stat().st_size} for name, path in files.items()
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": entries}, indent=2), encoding="utf-8")
    for path in (*files.values(), manifest):
        _fsync(path)
    return sum(path.stat().st_size for path in (*files.values(), manifest))


def _read_manifest(directory: Path, uri: CheckpointUri) -> dict[str, Any]:
    try:
        files: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in files:
            check_name(name)
    except (OSError, ValueError, LookupError, TypeError, InvalidRequest) as error:
        raise _incomplete(uri, error) from error
    return files


def _incomplete(uri: CheckpointUri, error: Exception) -> ServerFault:
    return ServerFault(
        f"checkpoint {uri}: its files are incomplete ({words_of(error)}); restore them or save again"
    )


def _check_manifest(directory: Path, uri: CheckpointUri) -> None:
    files = _read_manifest(directory, uri)
    try:
        damaged = [name for name, entry in files.items() if _sha256(directory / name) != entry["sha256"]]
    except (OSError, KeyError) as error:
        raise _incomplete(uri, error) from error
    if damaged:
        raise ServerFault(
            f"checkpoint {uri}: {', '.join(damaged)} differs from its checksum; restore it or save again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
