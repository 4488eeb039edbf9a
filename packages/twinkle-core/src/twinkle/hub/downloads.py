"""Downloads from the two public hubs, behind one function.

Both official clients resume interrupted downloads, verify files and show progress bars, so nothing of that is done
here. They are imported only when needed, since that takes a while.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

Hub: TypeAlias = Literal["hf", "ms"]
Kind: TypeAlias = Literal["model", "dataset"]

NAMES: Final[Mapping[str, str]] = {"hf": "Hugging Face", "ms": "ModelScope"}

_PROBE_SECONDS: Final = 5.0


class HubUnavailable(Exception):
    """The hub does not have it, or can't be reached and nothing is cached; the message says which."""


def download(
    hub: Hub, repository: str, kind: Kind, allow_patterns: Sequence[str] | None, revision: str | None
) -> Path:
    """The local folder of a repository, updated if the hub can be reached.

    Raises:
        HubUnavailable: if there is nothing to return.
    """
    patterns = None if allow_patterns is None else list(allow_patterns)
    if hub == "hf":
        return _from_huggingface(repository, kind, patterns, revision)
    return _from_modelscope(repository, kind, patterns, revision)


def _from_huggingface(repository: str, kind: Kind, patterns: list[str] | None, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns
        )
    except errors.LocalEntryNotFoundError as error:
        state = "offline (HF_HUB_OFFLINE)" if _offline() else "can't be reached"
        raise HubUnavailable(
            f"{state}, and it has not been downloaded before ({_first_line(error)})"
        ) from error
    except errors.GatedRepoError as error:
        raise HubUnavailable(
            f"gated; ask for access on its page and log in with `hf auth login` ({_first_line(error)})"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubUnavailable("no such repository, or a private one and you are not logged in") from error
    except errors.RevisionNotFoundError as error:
        raise HubUnavailable(f"no such revision: {revision}") from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise HubUnavailable(_first_line(error)) from error
    return Path(found)


def _from_modelscope(repository: str, kind: Kind, patterns: list[str] | None, revision: str | None) -> Path:
    import modelscope_hub

    if "/" not in repository:
        raise HubUnavailable("ids are org/name there")
    api = modelscope_hub.HubApi()
    reason = (
        "offline (HF_HUB_OFFLINE)"
        if _offline()
        else _unreachable(modelscope_hub.get_default_config().endpoint)
    )
    if reason is None:
        try:
            return api.download_repo(repository, kind, revision=revision, allow_patterns=patterns)
        except modelscope_hub.NetworkError as error:
            reason = f"can't be reached ({_first_line(error)})"
        except modelscope_hub.NotExistError as error:
            private = "no such repository or revision, or a private one and you are not logged in"
            raise HubUnavailable(private) from error
        except (modelscope_hub.HubError, OSError) as error:
            raise HubUnavailable(_first_line(error)) from error
    try:
        return api.download_repo(repository, kind, revision=revision, local_files_only=True)
    except modelscope_hub.CacheNotFound as error:
        raise HubUnavailable(f"{reason}, and it has not been downloaded before") from error


def _unreachable(url: str | None) -> str | None:
    """Why `url` can't be reached; None if it can.

    ModelScope's client retries for many seconds even if there is plainly no network.
    """
    import httpx

    try:
        # Only whether anything answers counts: the client itself checks certificates.
        httpx.head(url or "", timeout=_PROBE_SECONDS, verify=False)
    except (httpx.NetworkError, httpx.TimeoutException) as error:
        return f"can't be reached ({_first_line(error)})"
    except (ImportError, ValueError):  # a kind of proxy that the client may support though httpx does not
        return None
    return None


def _offline() -> bool:
    """Whether the user disabled the network, by huggingface_hub's variable."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
