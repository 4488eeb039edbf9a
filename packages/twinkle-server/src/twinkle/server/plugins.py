"""Backends and engines by name, through entry points: the built-in ones are found the way third parties' are."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from twinkle.protocol.errors import InvalidRequest

TRAINING_BACKENDS = "twinkle.training_backends"
SAMPLING_ENGINES = "twinkle.sampling_engines"


def find(group: str, name: str) -> Any:
    """The class registered as `name`.

    Raises:
        InvalidRequest: if there is none of that name, or several distributions claim it.
    """
    return look_up(group, name).load()


def look_up(group: str, name: str) -> EntryPoint:
    """What is registered as `name`, without importing it: that takes seconds, and only ranks need it.

    Raises:
        InvalidRequest: as `find`.
    """
    known = entry_points(group=group)
    matches = [point for point in known if point.name == name]
    if not matches:
        names = ", ".join(sorted(point.name for point in known)) or "none"
        hint = "; pip install 'twinkle-server[megatron]' adds it" if name == "megatron" else ""
        raise InvalidRequest(f"{group}: {name!r} is not installed (installed: {names}){hint}")
    if len({point.value for point in matches}) > 1:
        claims = ", ".join(sorted(point.value for point in matches))
        raise InvalidRequest(
            f"{group}: {name!r} is claimed by several distributions ({claims}); uninstall all but one"
        )
    return matches[0]
