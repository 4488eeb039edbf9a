"""Resolves an id to a folder: which places are searched, and in which order.

    ms://org/name       ModelScope
    hf://org/name       Hugging Face (hf://name too, for its oldest repositories)
    org/name            a folder of that name below the working directory if there is one; else Hugging Face, then
                        ModelScope; the other way round with TWINKLE_HUB=ms
    file:///dir, /dir, ./dir, ~/dir
                        that folder, or file

With TWINKLE_HUB_ROOT=/dir, /dir/org/name is searched first for every id that names a repository, so that a machine
without network runs the same scripts. HF_HUB_OFFLINE=1 restricts both hubs to cached downloads.
"""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from twinkle.hub import downloads
from twinkle.hub.downloads import Hub, Kind
from twinkle.protocol.errors import InvalidRequest, NotFound

logger = logging.getLogger(__name__)

# One name or two; a name of only dots would escape the folder that it is looked up in.
_REPOSITORY: Final = re.compile(r"(?!\.+(/|$))[\w.-]+(/(?!\.+$)[\w.-]+)?", re.ASCII)


def resolve(
    id: str,
    kind: Kind = "model",
    allow_patterns: Sequence[str] | None = None,
    revision: str | None = None,
) -> Path:
    """The folder (or file) that `id` names, downloaded if necessary.

    Args:
        id: see above.
        kind: what to look for on a hub, where a model and a dataset may have the same name.
        allow_patterns: globs of the files that are needed; default: all. Doesn't apply to local folders.
        revision: branch, tag or commit on a hub; default: the default branch. Doesn't apply to local folders.

    Raises:
        InvalidRequest: if `id` is not a valid id.
        NotFound: if it is in none of the places, which the message lists.
    """
    scheme, repository = _split(id)
    if scheme == "path":
        return _existing(Path(repository), id)

    tried: list[str] = []
    places: list[Path] = []
    if _REPOSITORY.fullmatch(repository):
        places.extend(_in_hub_root(repository))
    if scheme == "any" and repository:
        places.append(Path(repository).absolute())
    for place in places:
        if place.exists():
            return place
        tried.append(f"{place}: not there")
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidRequest(
            f"{id!r} is neither an existing path nor the id of a repository; ids look like org/name, ms://org/name "
            "or hf://org/name"
        )

    for hub in _hubs(scheme):
        try:
            found = downloads.download(hub, repository, kind, allow_patterns, revision)
        except downloads.HubUnavailable as error:
            tried.append(f"{downloads.NAMES[hub]}: {error}")
            continue
        logger.info("%s %s: taken from %s", kind, id, downloads.NAMES[hub])
        return found
    raise _not_found(id, repository, kind, tried)


def plain_name(id: str) -> str:
    """A model's name for any loader: `org/name` for a hub's repository, or the folder's absolute path.

    All ids of a model have the same plain name, such as `ms://org/name` and `org/name/`. An id with an unknown scheme
    is returned unchanged.
    """
    try:
        scheme, rest = _split(id)
    except InvalidRequest:
        return id
    name = rest.rstrip("/")
    is_folder = scheme == "path" or (scheme == "any" and name and not _REPOSITORY.fullmatch(name))
    return os.path.abspath(rest) if is_folder else name


def _split(id: str) -> tuple[str, str]:
    """An id as (scheme, rest), where scheme is "ms", "hf", "any" (none given) or "path" (certainly a path)."""
    scheme, separator, rest = id.partition("://")
    if not separator:
        is_path = id.startswith(("/", "./", "../", "~")) or id in {".", ".."}
        return ("path", str(Path(id).expanduser())) if is_path else ("any", id)
    if scheme == "file":
        return "path", unquote(urlsplit(id).path)
    if scheme not in downloads.NAMES:
        raise InvalidRequest(f"{id!r}: unknown scheme {scheme!r}; allowed are ms://, hf://, file:// and none")
    return scheme, rest


def _in_hub_root(repository: str) -> list[Path]:
    root = os.environ.get("TWINKLE_HUB_ROOT")
    return [Path(root).expanduser().absolute() / repository] if root else []


def _hubs(scheme: str) -> Sequence[Hub]:
    preferred = os.environ.get("TWINKLE_HUB") or "hf"
    if preferred not in downloads.NAMES:
        raise InvalidRequest(f"TWINKLE_HUB={preferred}: allowed are hf and ms")
    if scheme == "any":
        return ("ms", "hf") if preferred == "ms" else ("hf", "ms")
    return ("ms",) if scheme == "ms" else ("hf",)


def _existing(path: Path, id: str) -> Path:
    if not path.exists():
        raise NotFound(f"{id!r}: no such folder or file: {path.absolute()}")
    return path.absolute()


def _not_found(id: str, repository: str, kind: Kind, tried: list[str]) -> NotFound:
    places = "".join(f"  - {line}\n" for line in tried)
    return NotFound(
        f"{kind} {id!r} was not found. Tried:\n{places}"
        "Check the id, and your login if it is private. With no network, put the files into a folder laid out as "
        f"DIR/{repository} and set TWINKLE_HUB_ROOT=DIR, or give the folder itself instead of the id."
    )
