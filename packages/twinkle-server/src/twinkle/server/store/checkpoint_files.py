"""Checkpoints as folders in PEFT layout, with optimizer state and a manifest beside it.

    RUN/KIND/NAME/adapter_config.json, adapter_model.safetensors    what PEFT loads
                  optimizer.safetensors                             AdamW's moments, if saved
                  README.md                                         description
                  NAME.age                                          in place of each of these, if encrypted
                  manifest.json                                     sha256 and size of each file

A visible one is whole: `files` sees to it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from twinkle.protocol.errors import InvalidRequest, ServerFault, words_of
from twinkle.protocol.uris import CheckpointUri, check_name
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import PLAIN_MODEL, AdapterState, ExportFacts
from twinkle.server.store.encryption import SUFFIX, encrypt_files
from twinkle.server.store.files import Files

MANIFEST = "manifest.json"


class CheckpointFiles:
    """The files of checkpoints. Names have been checked by `uris`: none of them is a path. Each method raises
    `FilesAway` if the files can't be reached.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

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
        with self._files.new_folder(_place(uri)) as directory:
            peft_format.write(directory, state, base_model, facts)
            if recipients:
                encrypt_files(directory, recipients)
            return _write_manifest(directory)

    def read(self, uri: CheckpointUri, with_optimizer: bool) -> AdapterState:
        """Read a checkpoint, after checking its files against the manifest.

        Raises:
            ServerFault: if a file is missing or has changed.
            InvalidRequest: if the optimizer's state is asked for but was not saved, or the files are encrypted.
        """
        with self._checked(uri) as directory:
            if (directory / (peft_format.WEIGHTS + SUFFIX)).is_file():
                raise InvalidRequest(f"{uri} is encrypted for whoever has its keys: the server can't read it")
            return peft_format.read(directory, with_optimizer)

    def copy(self, source: CheckpointUri, target: CheckpointUri) -> None:
        """Make a second checkpoint with the same content.

        Raises:
            ServerFault: if a file of the source is missing or has changed.
        """
        with self._checked(source) as directory, self._files.new_folder(_place(target)) as copy:
            shutil.copytree(directory, copy, dirs_exist_ok=True)

    @contextmanager
    def _checked(self, uri: CheckpointUri) -> Generator[Path]:
        """A checkpoint's directory, to read, after checking its files."""
        with ExitStack() as held:
            try:
                directory = held.enter_context(self._files.folder(_place(uri)))
                files = _entries((directory / MANIFEST).read_bytes(), uri)
                damaged = [
                    name for name, entry in files.items() if _sha256(directory / name) != entry["sha256"]
                ]
            except (OSError, KeyError) as error:
                raise _incomplete(uri, error) from error
            if damaged:
                raise ServerFault(
                    f"checkpoint {uri}: {', '.join(damaged)} differs from its checksum; restore it or save again"
                )
            yield directory

    def is_there(self, uri: CheckpointUri) -> bool:
        return self._files.has_folder(_place(uri))

    def sizes(self, uri: CheckpointUri) -> dict[str, int]:
        """The checkpoint's files by name, with their sizes in bytes.

        Raises:
            ServerFault: if the manifest is missing or unreadable, or a file has the wrong size.
        """
        try:
            manifest, found = self._files.look(_place(uri), MANIFEST)
            sizes = {name: int(entry["size_bytes"]) for name, entry in _entries(manifest, uri).items()}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise _incomplete(uri, error) from error
        if missing := [name for name in sizes if name not in found]:
            raise _incomplete(uri, ValueError(f"{', '.join(missing)} is missing"))
        if wrong := [name for name, size in sizes.items() if found[name] != size]:
            raise _incomplete(uri, ValueError(f"{', '.join(wrong)} is not as long as it was"))
        return sizes

    def digest(self, uri: CheckpointUri) -> str:
        """SHA-256 of the manifest, which has those of all files, so it differs between checkpoints.

        Raises:
            ServerFault: if the manifest is missing.
        """
        try:
            return hashlib.sha256(self._files.read(_place(uri), MANIFEST)).hexdigest()
        except OSError as error:
            raise _incomplete(uri, error) from error

    def read_part(self, uri: CheckpointUri, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of a file that `sizes` names.

        Raises:
            OSError: if it is not there.
        """
        return self._files.read(_place(uri), name, offset, size)

    def url(self, uri: CheckpointUri, name: str) -> str:
        """Where a file is, for those that can reach the files themselves."""
        return self._files.url(_place(uri), name)

    def delete(self, uri: CheckpointUri) -> None:
        self._files.delete_folder(_place(uri))

    def delete_leftovers(self) -> None:
        """Delete what processes that were killed had begun to write."""
        self._files.delete_leftovers()


def _place(uri: CheckpointUri) -> str:
    assert uri.run_id is not None and uri.kind is not None, "bare names are looked up in the database first"
    return f"{uri.run_id}/{uri.kind}/{uri.name}"


def _write_manifest(directory: Path) -> int:
    """Returns the size of all files in bytes."""
    files = sorted(directory.iterdir())
    entries = {path.name: {"sha256": _sha256(path), "size_bytes": path.stat().st_size} for path in files}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"format": 1, "files": entries}, indent=2), encoding="utf-8")
    return sum(path.stat().st_size for path in (*files, manifest))


def _entries(manifest: bytes, uri: CheckpointUri) -> dict[str, Any]:
    """What a manifest says of each file."""
    try:
        files: dict[str, Any] = json.loads(manifest)["files"]
        for name in files:
            check_name(name)
    except (ValueError, LookupError, TypeError, InvalidRequest) as error:
        raise _incomplete(uri, error) from error
    return files


def _incomplete(uri: CheckpointUri, error: Exception) -> ServerFault:
    return ServerFault(
        f"checkpoint {uri}: its files are incomplete ({words_of(error)}); restore them or save again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
