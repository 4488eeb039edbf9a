"""Tokenizers without a hub: from TWINKLE_HUB_ROOT, or from the Twinkle server, cached for the user.

    1. the folder of the model below TWINKLE_HUB_ROOT, if that is set and has it
    2. what the SDK does: Hugging Face, or its cache
    3. the server that the client talks to: GET /api/v1/tokenizer_urls?base_model=NAME names the address of each file

The SDK loads them, since it accepts a folder as a tokenizer's name. A cached folder is never refreshed: delete
~/.cache/twinkle/tokenizers after changing the tokenizer behind the same address and name.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import httpx

# A name of one part, without a leading dot, so that the file stays inside its folder.
_PLAIN_NAME: Final = re.compile(r"\w[\w.-]*", re.ASCII)

_TIMEOUT_S: Final = 60.0

# connection -> model -> folder: what a server provided once is not searched on a hub again, which takes long on
# networks that silently drop packets.
_from_server_before: WeakKeyDictionary[Any, dict[str, Path]] = WeakKeyDictionary()


def from_hub_root_or_server(
    original: Callable[[Any], Any], base_model: Callable[[Any], str], load: Callable[[str, str], Any]
) -> Callable[[Any], Any]:
    """`get_tokenizer` of one of the SDK's clients, with places to search before and after its own.

    Args:
        original: the SDK's method.
        base_model: from a client to its base model's name; may ask the server.
        load: the SDK's loader, from a model's name and the folder of its tokenizer.
    """

    def get_tokenizer(self: Any) -> Any:
        known = _from_server_before.setdefault(self.holder, {})
        if known or os.environ.get("TWINKLE_HUB_ROOT"):
            model = base_model(self)
            folder = _in_hub_root(model) or known.get(model)
            if folder is not None:
                return load(model, str(folder))
        try:
            return original(self)
        except (OSError, ValueError, httpx.HTTPError) as error:
            model = base_model(self)
            folder = _from_server_or_note(self.holder, model, error)
            if folder is None:
                raise
        known[model] = folder
        return load(model, str(folder))

    return get_tokenizer


def _in_hub_root(model: str) -> Path | None:
    root = os.environ.get("TWINKLE_HUB_ROOT")
    if not root or not (Path(root).expanduser() / model.split("://")[-1]).is_dir():
        return None
    from twinkle.hub import resolve

    return resolve(model)


def _from_server_or_note(holder: Any, model: str, error: Exception) -> Path | None:
    """The folder with the server's tokenizer; or None, after adding the reason to the SDK's own error as a note."""
    try:
        return _from_server(holder, model)
    except Exception as reason:
        error.add_note(f"The server was asked for the tokenizer of {model} as well: {reason}")
        return None


def _from_server(holder: Any, model: str) -> Path:
    """The folder in the cache, downloaded if missing.

    Args:
        holder: the SDK's connection, whose address and key are used.
        model: the server's name of the base model.

    Raises:
        Exception: anything that the SDK raises for a refused request.
        ValueError: if the reply is malformed, or a file's name is not a plain name.
        httpx.HTTPError: if a file can't be downloaded.
        OSError: if the cache can't be written.
    """
    address, urls = holder.run_coroutine_threadsafe(_ask(holder, model)).result()
    folder = _cache() / hashlib.sha256(f"{address} {model}".encode()).hexdigest()
    if not folder.is_dir():
        _download(urls, folder)
    return folder


async def _ask(holder: Any, model: str) -> tuple[str, Mapping[str, str]]:
    """The server's address, and the addresses of the tokenizer's files."""
    from twinkle.protocol.messages import ExternalWeightsUrls

    pool = import_module("tinker.lib.client_connection_pool_type").ClientConnectionPoolType.TRAIN
    with holder.aclient(pool) as client:
        reply = await client.get(
            "/api/v1/tokenizer_urls", options={"params": {"base_model": model}}, cast_to=object
        )
        return str(client.base_url), ExternalWeightsUrls.model_validate(reply).urls


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinkle" / "tokenizers"


def _download(urls: Mapping[str, str], folder: Path) -> None:
    """Download into `folder` atomically; another process may do so first."""
    for name in urls:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"the server named a file {name!r}; a tokenizer's files have plain names")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name[:8]}-", dir=folder.parent))
    try:
        with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=True) as http:
            for name, url in urls.items():
                with http.stream("GET", url) as response, (unfinished / name).open("wb") as file:
                    response.raise_for_status()
                    for chunk in response.iter_bytes():
                        file.write(chunk)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
