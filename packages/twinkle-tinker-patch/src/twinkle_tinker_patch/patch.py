"""What keeps the Tinker SDK to Tinker's own service, and how it is opened: three functions are wrapped, none rewritten.

A program needs no patch at all if its key begins with `tml-` and its paths with `tinker://`: TINKER_BASE_URL and
TINKER_API_KEY do. The patch adds keys of any form (or none) and `twinkle://` paths.

It holds for this process: call `init_tinker_client` before the first Tinker client is made, and again in every process
that unpickles one. The `tinker` command line is a process of its own and stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any

KEY_PREFIX = "tml-"

# Stands for "no key" in TINKER_API_KEY, since the SDK makes no client without one; it is never sent.
NO_KEY = KEY_PREFIX + "none"

_replaced: list[tuple[type, str, object]] = []
_environment_before: dict[str, str | None] = {}


def init_tinker_client(base_url: str | None = None, api_key: str | None = None) -> None:
    """Open the installed Tinker SDK to Twinkle servers; calling it again changes only what is given.

    Args:
        base_url: where clients that name no address connect, for example 'http://localhost:8000'; kept in
            TINKER_BASE_URL.
        api_key: what clients that name no key send, of any form; kept in TINKER_API_KEY. Without one, there or by
            TINKER_CREDENTIAL_CMD, no key is sent, and never the one that `tinker auth login` stored for Tinker's own
            service: a server in open mode takes that.

    Raises:
        ImportError: if the Tinker SDK is not installed, or is of a version that this package can't open. Then nothing
            has changed.
    """
    if not _replaced:
        _replace(_wrappers())
    if (
        api_key is None
        and not os.environ.get("TINKER_API_KEY")
        and not os.environ.get("TINKER_CREDENTIAL_CMD")
    ):
        api_key = NO_KEY
    _set_environment("TINKER_BASE_URL", base_url)
    _set_environment("TINKER_API_KEY", api_key)


def unpatch() -> None:
    """Put back what `init_tinker_client` changed: the SDK, TINKER_BASE_URL and TINKER_API_KEY."""
    while _replaced:
        owner, name, original = _replaced.pop()
        setattr(owner, name, original)
    while _environment_before:
        name, value = _environment_before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _wrappers() -> list[tuple[type, str, object]]:
    """Class, attribute and its wrapped form, for all three places."""
    try:
        import_module("tinker")
        auth = import_module("tinker.lib._auth_token_provider").ApiKeyAuthProvider
        holder = import_module("tinker.lib.internal_client_holder").InternalClientHolder
        parsed_path = import_module("tinker.types.checkpoint").ParsedCheckpointTinkerPath
        return [
            (auth, "__init__", _accept_any_key(auth.__init__)),
            (holder, "_create_sampling_session", _accept_both_schemes(holder._create_sampling_session)),
            (parsed_path, "from_tinker_path", _parse_both_schemes(parsed_path.from_tinker_path)),
        ]
    except ModuleNotFoundError as error:
        if error.name != "tinker":
            raise ImportError(_UNKNOWN_VERSION.format(missing=error)) from error
        raise ImportError(
            "init_tinker_client needs the Tinker SDK: pip install 'twinkle-tinker-patch[sdk]'", name="tinker"
        ) from error
    except AttributeError as error:
        raise ImportError(_UNKNOWN_VERSION.format(missing=error)) from error


_UNKNOWN_VERSION = (
    "init_tinker_client can't open the installed Tinker SDK ({missing}); it is made for versions 0.22 to 0.38: "
    "pip install 'tinker==0.38.0'. Without it, set TINKER_BASE_URL and a TINKER_API_KEY that begins with 'tml-'."
)


def _accept_any_key(original: Callable[[Any, str], None]) -> Callable[[Any, str | None], None]:
    def __init__(self: Any, api_key: str | None = None) -> None:
        key = api_key or os.environ.get("TINKER_API_KEY") or NO_KEY
        # With its prefix before it any key passes; the SDK then sends what `_token` holds.
        original(self, KEY_PREFIX + key)
        self._token = "" if key == NO_KEY else key

    return __init__


def _accept_both_schemes(
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


def _as_tinker(path: str) -> str:
    return "tinker://" + path.removeprefix("twinkle://") if path.startswith("twinkle://") else path


def _replace(wrappers: list[tuple[type, str, object]]) -> None:
    for owner, name, wrapper in wrappers:
        _replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, wrapper)


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        return
    _environment_before.setdefault(name, os.environ.get(name))
    os.environ[name] = value
