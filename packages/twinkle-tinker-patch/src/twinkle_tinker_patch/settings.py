"""Which server, and with which key: what was given first, then the environment, the SDK's own variables before ours."""

import os

DEFAULT_BASE_URL = "http://localhost:8000"

KEY_PREFIX = "tml-"

# Stands for "no key" in TINKER_API_KEY, since the SDK makes no client without one; the patched SDK never sends it.
NO_KEY = KEY_PREFIX + "none"


def resolve_base_url(given: str | None) -> str:
    """The address of clients that name none: never that of Tinker's own service, unless TINKER_BASE_URL says so.

    Raises:
        InvalidRequest: if it is no URL.
    """
    url = given or os.environ.get("TINKER_BASE_URL") or os.environ.get("TWINKLE_BASE_URL") or DEFAULT_BASE_URL
    if not url.startswith(("http://", "https://")):
        # Imported here: every process of a program imports this module as it starts.
        from twinkle.protocol.errors import InvalidRequest

        raise InvalidRequest(
            f"base_url: {url!r} must begin with http:// or https://, as in {DEFAULT_BASE_URL}. "
            "It is given as an argument, or by TINKER_BASE_URL or TWINKLE_BASE_URL."
        )
    return url.rstrip("/")


def resolve_api_key(given: str | None) -> str | None:
    """The key of clients that name none; None leaves it to TINKER_CREDENTIAL_CMD.

    Where there is no key at all it is `NO_KEY`, and not the one that `tinker auth login` stored for Tinker's own
    service: the SDK looks for that only where TINKER_API_KEY is empty.
    """
    key = given or os.environ.get("TINKER_API_KEY")
    if key or os.environ.get("TINKER_CREDENTIAL_CMD"):
        return key or None
    return os.environ.get("TWINKLE_API_KEY") or NO_KEY
