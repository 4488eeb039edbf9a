"""Downloads of checkpoints and of the base model's tokenizer."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import NotFound, ServerFault
from twinkle.server.service.metadata import iso
from twinkle.server.store import tables
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database
from twinkle.server.tokens import ARCHIVE, DOWNLOAD_SECONDS, TOKENIZER, Download, Signer

# The files that Transformers and `tokenizers` load a tokenizer from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)


class Downloads:
    """Makes download URLs and reads the files behind them. Without a signer (local mode) URLs are file:// ones."""

    def __init__(
        self, files: CheckpointFiles, database: Database, model_path: Path | None, signer: Signer | None
    ) -> None:
        """
        Args:
            model_path: directory of the base model, if it has one.
        """
        self._files = files
        self._database = database
        self._model_path = model_path
        self._signer = signer

    # ------------------------------------------------------------ URLs

    def checkpoint(self, tenant: str, row: tables.Checkpoint) -> m.ExternalWeightsUrls:
        """One URL for each of the checkpoint's files."""
        return self._urls(tenant, str(row.uri), list(self._files.sizes(row.uri)), self._stamp(row))

    def archive(self, tenant: str, row: tables.Checkpoint) -> m.ExternalWeightsUrls:
        """One URL, of a tar archive of all files."""
        return self._urls(tenant, str(row.uri), [ARCHIVE], self._stamp(row))

    def tokenizer(self, tenant: str) -> m.ExternalWeightsUrls:
        """
        Raises:
            NotFound: if the model has no tokenizer.
        """
        return self._urls(tenant, TOKENIZER, list(self._tokenizer_files()))

    def _stamp(self, row: tables.Checkpoint) -> str:
        """Distinguishes a checkpoint from later ones of the same name."""
        # The digest too, since overwriting a checkpoint replaces its files before its row.
        return f"{row.created_at!r} {self._files.digest(row.uri)}"

    def _urls(self, tenant: str, place: str, files: list[str], stamp: str = "") -> m.ExternalWeightsUrls:
        urls = {name: self._url(Download(tenant, place, name, stamp)) for name in files}
        return m.ExternalWeightsUrls(urls=urls, expires=iso(time.time() + DOWNLOAD_SECONDS))

    def _url(self, download: Download) -> str:
        """Relative to the gateway's own URL, which the gateway prepends."""
        if self._signer is None:
            return self._path(download).resolve().as_uri()
        return f"/download/{self._signer.download_token(download)}/{shown_name(download)}"

    # ------------------------------------------------------------ files

    def sizes(self, download: Download) -> dict[str, int]:
        """Size in bytes of each file of a download: one, or all in the archive.

        Raises:
            NotFound: if they are gone, or this tenant may not read them.
        """
        if download.place == TOKENIZER:
            files = {name: path.stat().st_size for name, path in self._tokenizer_files().items()}
        else:
            uri = uris.parse(download.place)
            row = self._database.checkpoint(download.tenant, uri, time.time(), or_public=True)
            if row is None or not self._files.path(uri).is_dir() or self._stamp(row) != download.stamp:
                raise _not_there(download)
            files = self._files.sizes(uri)
        if download.file == ARCHIVE:
            return files
        if download.file not in files:
            raise NotFound(f"{download.place} has no file {download.file!r}")
        return {download.file: files[download.file]}

    def read(self, download: Download, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of one of the files that `sizes` names.

        Raises:
            NotFound: if it is gone.
        """
        assert download.file in (ARCHIVE, name), "names come from `sizes`"
        try:
            with self._path(replace(download, file=name)).open("rb") as file:
                # Checked after opening: the checkpoint may be replaced at any time, but an open file stays the same.
                self._check_is_it(download)
                file.seek(offset)
                return file.read(size)
        except (OSError, ServerFault) as error:
            raise _not_there(download) from error

    def _check_is_it(self, download: Download) -> None:
        """
        Raises:
            NotFound: if the checkpoint was replaced by another.
        """
        if download.place == TOKENIZER:
            return
        if self._files.digest(uris.parse(download.place)) != download.stamp.rpartition(" ")[2]:
            raise _not_there(download)

    def _path(self, download: Download) -> Path:
        if download.place == TOKENIZER:
            return self._tokenizer_files()[download.file]
        return self._files.path(uris.parse(download.place)) / download.file

    def _tokenizer_files(self) -> dict[str, Path]:
        found = {
            name: self._model_path / name
            for name in TOKENIZER_FILES
            if self._model_path is not None and (self._model_path / name).is_file()
        }
        if not found:
            raise NotFound("base_model: this server's model came without tokenizer files")
        return found


def _not_there(download: Download) -> NotFound:
    return NotFound(
        f"{download.place} is not there any more as it was when this address was made: it was deleted, overwritten or "
        "is no longer published; ask for a new address"
    )


def shown_name(download: Download) -> str:
    """The file name a browser would save it under."""
    if download.file != ARCHIVE:
        return download.file
    return uris.parse(download.place).name + ARCHIVE if download.place != TOKENIZER else TOKENIZER + ARCHIVE
