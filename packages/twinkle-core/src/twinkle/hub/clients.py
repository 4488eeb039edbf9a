"""The two public hubs, behind one function.

Both official clients resume a download that was cut off, check what they got and draw their own progress
bars; nothing of that is repeated here. They are imported only when a hub is really asked, since that takes a
while.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

Hub: TypeAlias = Literal["hf", "ms"]
Kind: TypeAlias = Literal["model", "dataset"]

NAMES: Final[Mapping[str, str]] = {"hf": "Hugging Face", "ms": "ModelScope"}


class Unavailable(Exception):
    """The hub does not have it, or can't be reached and has not been asked for it before; the text says which."""


def download(
    hub: Hub,
    repository: str,
    kind: Kind,
    allow_patterns: Sequence[str] | None,
    revision: str | None,
) -> Path:
    """The local folder of a repository, brought up to date if the hub can be reached.

    Raises:
        Unavailable: if there is nothing to return.
    """
    patterns = None if allow_patterns is None else list(allow_patterns)
    if hub == "hf":
        return _from_huggingface(repository, kind, patterns, revision)
    return _from_modelscope(repository, kind, patterns, revision)


def _from_huggingface(repository: str, kind: Kind, patterns: list[str] | None, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = huggingface_hub.snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns
        )
    except LocalEntryNotFoundError as error:
        state = "offline (HF_HUB_OFFLINE)" if _offline() else "can't be reached"
        raise Unavailable(f"{state}, and it has not been downloaded before ({_first_line(error)})") from error
    except GatedRepoError as error:
        raise Unavailable(
            f"gated; ask for access on its page and log in with `hf auth login` ({_first_line(error)})"
        ) from error
    except RepositoryNotFoundError as error:
        raise Unavailable("no such repository, or a private one and you are not logged in") from error
    except RevisionNotFoundError as error:
        raise Unavailable(f"no such revision: {revision}") from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise Unavailable(_first_line(error)) from error
    return Path(found)


def _from_modelscope(repository: str, kind: Kind, patterns: list[str] | None, revision: str | None) -> Path:
    import modelscope_hub
    from modelscope_hub import CacheNotFound, HubError, NetworkError, NotExistError

    if "/" not in repository:
        raise Unavailable("ids are org/name there")
    api = modelscope_hub.HubApi()
    try:
        if not _offline():
            return api.download_repo(repository, kind, revision=revision, allow_patterns=patterns)
        reason = "offline (HF_HUB_OFFLINE)"
    except NetworkError as error:
        reason = f"can't be reached ({_first_line(error)})"
    except NotExistError as error:
        raise Unavailable(
            "no such repository or revision, or a private one and you are not logged in"
        ) from error
    except (HubError, OSError) as error:
        raise Unavailable(_first_line(error)) from error
    try:
        return api.download_repo(repository, kind, revision=revision, local_files_only=True)
    except CacheNotFound as error:
        raise Unavailable(f"{reason}, and it has not been downloaded before") from error


def _offline() -> bool:
    """Whether the user asked for no network, by the variable that huggingface_hub defines."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
