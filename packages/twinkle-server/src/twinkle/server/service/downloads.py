"""Downloads of checkpoints and of the base model's tokenizer."""

from __future__ import annotations

import time
from pathlib import Path

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import NotFound, ServerFault
from twinkle.protocol.uris import CheckpointUri
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

    def tokenizer(self, tenant: str, base_model: str) -> m.ExternalWeightsUrls:
        """
        Args:
            base_model: the plain name of the one that is served here.

        Raises:
            NotFound: if the model has no tokenizer.
        """
        return self._urls(tenant, TOKENIZER, list(self._tokenizer_files()), base_model)

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
            if download.place == TOKENIZER:
                return self._tokenizer_files()[download.file].resolve().as_uri()
            return self._files.url(uris.parse(download.place), download.file)
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
            if row is None or not self._files.is_there(uri) or self._stamp(row) != download.stamp:
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
            if download.place == TOKENIZER:
                with self._tokenizer_files()[name].open("rb") as file:
                    file.seek(offset)
                    return file.read(size)
            uri = uris.parse(download.place)
            part = self._files.read_part(uri, name, offset, size)
            # Checked after reading: the checkpoint may be replaced at any time, and is never what it was before.
            self._check_is_it(download, uri)
            return part
        except (OSError, ServerFault) as error:
            raise _not_there(download) from error

    def _check_is_it(self, download: Download, uri: CheckpointUri) -> None:
        """
        Raises:
            NotFound: if the checkpoint was replaced by another.
        """
        if self._files.digest(uri) != download.stamp.rpartition(" ")[2]:
            raise _not_there(download)

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
