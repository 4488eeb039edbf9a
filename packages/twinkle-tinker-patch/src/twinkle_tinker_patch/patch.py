"""Removes what restricts the Tinker SDK to Tinker's own service, by wrapping a few functions.

A program needs no patch if its key begins with `tml-` and its paths with `tinker://`: TINKER_BASE_URL and
TINKER_API_KEY suffice. The patch adds keys of any form (or none), `twinkle://` paths, and tokenizers from the server.

It affects this process: call `init_tinker_client` before the first Tinker client is created, and again in every process
that unpickles one; `python -m twinkle_tinker_patch` does so in all processes of a program. `settings` finds address and
key, `versions` lists the known SDKs, `tokenizers` finds tokenizers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Coroutine
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from twinkle_tinker_patch.settings import KEY_PREFIX, NO_KEY, resolve_api_key, resolve_base_url
from twinkle_tinker_patch.versions import cannot_open, doubt_about


class _Change(NamedTuple):
    owner: type
    name: str
    value: object


# Marks an original that the class does not define but inherits.
_INHERITED = object()

_originals: list[_Change] = []
_environment_before: dict[str, str | None] = {}


def init_tinker_client(base_url: str | None = None, api_key: str | None = None) -> None:
    """Patch the installed Tinker SDK for Twinkle servers; calling it again changes only the given settings.

    Args:
        base_url: the address of clients that name none; stored in TINKER_BASE_URL. Default: TINKER_BASE_URL,
            TWINKLE_BASE_URL, or 'http://localhost:8000'.
        api_key: the key of clients that name none, of any form; stored in TINKER_API_KEY. Default: TINKER_API_KEY,
            TINKER_CREDENTIAL_CMD or TWINKLE_API_KEY; without any of these no key is sent, which a server in open mode
            accepts. The key that `tinker auth login` stored for Tinker's own service is never sent.

    Raises:
        ImportError: if the Tinker SDK is not installed, or lacks what this package patches. Then nothing is changed.
        InvalidRequest: if the address is not a URL. Then nothing is changed.

    Warns:
        UserWarning: if the SDK's version is unknown to this package, but has everything that it patches.
    """
    environment = {"TINKER_BASE_URL": resolve_base_url(base_url), "TINKER_API_KEY": resolve_api_key(api_key)}
    # First, since with the import hook this import calls `init_tinker_client` itself.
    sdk = _import_sdk()
    if not _originals:
        for change in _changes(sdk):
            _originals.append(change._replace(value=vars(change.owner).get(change.name, _INHERITED)))
            setattr(change.owner, change.name, change.value)
        doubt = doubt_about(sdk.__version__)
        if doubt is not None:
            warnings.warn(doubt, stacklevel=2)
    for name, value in environment.items():
        if value is not None:
            _environment_before.setdefault(name, os.environ.get(name))
            os.environ[name] = value


def unpatch() -> None:
    """Undo `init_tinker_client`: restore the SDK, TINKER_BASE_URL and TINKER_API_KEY."""
    while _originals:
        owner, name, original = _originals.pop()
        if original is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    while _environment_before:
        name, value = _environment_before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _import_sdk() -> ModuleType:
    try:
        return import_module("tinker")
    except ModuleNotFoundError as error:
        if error.name != "tinker":
            raise
        raise ImportError(
            "init_tinker_client needs the Tinker SDK: pip install 'twinkle-tinker-patch[sdk]'", name="tinker"
        ) from error


def _changes(sdk: ModuleType) -> list[_Change]:
    """The patched attributes of the SDK, with their new values."""
    try:
        auth = import_module("tinker.lib._auth_token_provider").ApiKeyAuthProvider
        holder = import_module("tinker.lib.internal_client_holder").InternalClientHolder
        parsed_path = import_module("tinker.types.checkpoint").ParsedCheckpointTinkerPath
        command_line = import_module("tinker.cli.lazy_group").LazyGroup
        return [
            _Change(auth, "__init__", _accept_any_key(auth.__init__)),
            _Change(auth, "async_auth_flow", _send_no_empty_key(auth.async_auth_flow)),
            _Change(
                holder, "_create_sampling_session", _sample_from_both_schemes(holder._create_sampling_session)
            ),
            _Change(parsed_path, "from_tinker_path", _parse_both_schemes(parsed_path.from_tinker_path)),
            _Change(command_line, "parse_args", _read_both_schemes(command_line.parse_args)),
            *_tokenizer_changes(),
        ]
    except (ModuleNotFoundError, AttributeError) as error:
        version = getattr(sdk, "__version__", "of no version")
        raise ImportError(cannot_open(version, missing=error)) from error


def _tokenizer_changes() -> list[_Change]:
    # Imported here since it needs httpx, which processes that never import the SDK should not load.
    from twinkle_tinker_patch.tokenizers import from_hub_root_or_server

    sampling_client = import_module("tinker.lib.public_interfaces.sampling_client")
    training = import_module("tinker.lib.public_interfaces.training_client").TrainingClient
    sampling = sampling_client.SamplingClient
    load = sampling_client._load_tokenizer_from_model_info

    def model_trained(client: Any) -> str:
        return client.get_info().model_data.model_name

    return [
        _Change(
            training, "get_tokenizer", from_hub_root_or_server(training.get_tokenizer, model_trained, load)
        ),
        _Change(
            sampling,
            "get_tokenizer",
            from_hub_root_or_server(sampling.get_tokenizer, sampling.get_base_model, load),
        ),
    ]


def _accept_any_key(original: Callable[[Any, str], None]) -> Callable[[Any, str | None], None]:
    def __init__(self: Any, api_key: str | None = None) -> None:
        key = api_key or os.environ.get("TINKER_API_KEY") or NO_KEY
        # Any key passes with the prefix in front; the SDK then sends the value of `_token`.
        original(self, KEY_PREFIX + key)
        self._token = "" if key == NO_KEY else key

    return __init__


def _send_no_empty_key(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Older SDKs put TINKER_API_KEY into every request first, and overwrite it with the provider's key if there is
    one.
    """

    def async_auth_flow(self: Any, request: Any) -> Any:
        if not self._token:
            request.headers.pop("X-API-Key", None)
        return original(self, request)

    return async_auth_flow


def _sample_from_both_schemes(
    original: Callable[[Any, str | None, str | None], Coroutine[Any, Any, str]],
) -> Callable[[Any, str | None, str | None], Coroutine[Any, Any, str]]:
    def _create_sampling_session(
        self: Any, model_path: str | None = None, base_model: str | None = None
    ) -> Coroutine[Any, Any, str]:
        return original(self, model_path and _as_tinker(model_path), base_model)

    return _create_sampling_session


def _parse_both_schemes(original: Callable[[str], Any]) -> staticmethod[[str], Any]:
    def from_tinker_path(tinker_path: str) -> Any:
        return original(_as_tinker(tinker_path)).model_copy(update={"tinker_path": tinker_path})

    return staticmethod(from_tinker_path)


def _read_both_schemes(original: Callable[[Any, Any, list[str]], list[str]]) -> Callable[..., list[str]]:
    """For the `tinker` command line, which compares paths literally: it sees only the scheme that it knows."""

    def parse_args(self: Any, ctx: Any, args: list[str]) -> list[str]:
        return original(self, ctx, [_as_tinker(argument) for argument in args])

    return parse_args


def _as_tinker(path: str) -> str:
    return "tinker://" + path.removeprefix("twinkle://") if path.startswith("twinkle://") else path
