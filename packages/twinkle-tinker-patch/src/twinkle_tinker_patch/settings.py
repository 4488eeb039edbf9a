"""Server address and key: arguments take precedence over the environment, and the SDK's variables over ours."""

import os

DEFAULT_BASE_URL = "http://localhost:8000"

KEY_PREFIX = "tml-"

# Stands for "no key" in TINKER_API_KEY, without which the SDK creates no client; the patched SDK never sends it.
NO_KEY = KEY_PREFIX + "none"


def resolve_base_url(given: str | None) -> str:
    """The address of clients that name none: never Tinker's own service, unless TINKER_BASE_URL says so.

    Raises:
        InvalidRequest: if it is not a URL.
    """
    url = given or os.environ.get("TINKER_BASE_URL") or os.environ.get("TWINKLE_BASE_URL") or DEFAULT_BASE_URL
    if not url.startswith(("http://", "https://")):
        # Imported here since every process of a program imports this module at its start.
        from twinkle.protocol.errors import InvalidRequest

        raise InvalidRequest(
            f"base_url: {url!r} must begin with http:// or https://, as in {DEFAULT_BASE_URL}. "
            "It is given as an argument, or by TINKER_BASE_URL or TWINKLE_BASE_URL."
        )
    return url.rstrip("/")


def resolve_api_key(given: str | None) -> str | None:
    """The key of clients that name none; None leaves it to TINKER_CREDENTIAL_CMD.

    Without any key it is `NO_KEY`, and not the one that `tinker auth login` stored for Tinker's own service, which the
    SDK uses only if TINKER_API_KEY is empty.
    """
    key = given or os.environ.get("TINKER_API_KEY")
    if key or os.environ.get("TINKER_CREDENTIAL_CMD"):
        return key or None
    return os.environ.get("TWINKLE_API_KEY") or NO_KEY
