"""Which server, and with which key: arguments first, then `init_twinkle_client`, then the environment."""

import os
from dataclasses import dataclass

from twinkle.protocol.errors import InvalidRequest

DEFAULT_BASE_URL = "http://localhost:8000"


@dataclass(frozen=True)
class Settings:
    """Where a client sends its requests.

    Attributes:
        base_url: without `/api/v1`; a path prefix is kept.
        api_key: None sends none, which a server in open mode accepts.
    """

    base_url: str
    api_key: str | None


_initialised = Settings(base_url="", api_key=None)


def init_twinkle_client(base_url: str | None = None, api_key: str | None = None) -> None:
    """Set the server and key that clients use when they are given none.

    Args:
        base_url: e.g. "http://gpu-host:8000"; if None, `TWINKLE_BASE_URL`, then http://localhost:8000.
        api_key: if None, `TWINKLE_API_KEY`, then no key.
    """
    global _initialised
    _initialised = Settings(base_url=base_url or "", api_key=api_key)


def resolve(base_url: str | None, api_key: str | None) -> Settings:
    """The settings of a new client.

    Raises:
        InvalidRequest: if the address is no URL.
    """
    url = base_url or _initialised.base_url or os.environ.get("TWINKLE_BASE_URL") or DEFAULT_BASE_URL
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(
            f"base_url: {url!r} must begin with http:// or https://, as in {DEFAULT_BASE_URL}"
        )
    key = api_key or _initialised.api_key or os.environ.get("TWINKLE_API_KEY") or None
    return Settings(base_url=url.rstrip("/"), api_key=key)
