"""The versions of the Tinker SDK that the patch was tested with, and the messages for all others."""

from types import MappingProxyType
from typing import Final

_ALL: Final = "all tests of this package"
_ALL_BUT_CONSOLE: Final = f"{_ALL}, but it has no get_console_url"

TESTED_VERSIONS: Final = MappingProxyType(
    {
        "0.38.0": _ALL,
        "0.36.0": _ALL,
        "0.35.0": _ALL,
        "0.34.0": _ALL,
        "0.33.1": _ALL,
        "0.30.0": _ALL,
        "0.28.0": _ALL,
        "0.26.2": _ALL_BUT_CONSOLE,
        "0.24.1": _ALL_BUT_CONSOLE,
        "0.22.0": _ALL_BUT_CONSOLE,
    }
)
"""SDK version -> what was tested with it."""

OLDEST: Final = (0, 22)
NEWEST: Final = (0, 38)

_WHAT_TO_DO: Final = (
    "It is made for versions 0.22 to 0.38: pip install 'tinker==0.38.0'. "
    "Without init_tinker_client, set TINKER_BASE_URL and a TINKER_API_KEY that begins with 'tml-'."
)


def cannot_open(version: str, missing: object) -> str:
    """The error for an SDK that lacks something."""
    return f"init_tinker_client can't open the installed Tinker SDK {version} ({missing}). {_WHAT_TO_DO}"


def doubt_about(version: str) -> str | None:
    """The warning for a version outside the known range that has all that the patch needs."""
    if OLDEST <= _release(version) <= NEWEST:
        return None
    return (
        f"init_tinker_client doesn't know version {version} of the Tinker SDK: all that it changes is there, but "
        f"what it leads to is untested. {_WHAT_TO_DO}"
    )


def _release(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) if there are none."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)
