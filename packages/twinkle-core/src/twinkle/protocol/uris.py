"""Names of checkpoints: `twinkle://RUN/KIND/NAME`, `tinker://RUN/KIND/NAME`, or a bare `twinkle://NAME`.

Both schemes mean the same. The bare form means the caller's newest checkpoint of that name.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from twinkle.protocol.errors import InvalidRequest

CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[str, ...] = get_args(CheckpointKind)

_SCHEME = re.compile(r"^(?:tinker|twinkle)://(?P<rest>.*)$", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,255}")


@dataclass(frozen=True)
class CheckpointUri:
    """A checkpoint's name, parsed.

    Attributes:
        name: as given when it was saved.
        run_id, kind: None in the bare form.
    """

    name: str
    run_id: str | None = None
    kind: CheckpointKind | None = None

    def __str__(self) -> str:
        if self.run_id is None:
            return f"twinkle://{self.name}"
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"


def check_name(name: str, field: str = "name") -> str:
    """Return `name` if it is a valid checkpoint name; a name is never a path.

    Raises:
        InvalidRequest: with what is allowed.
    """
    if _NAME.fullmatch(name) is None or ".." in name:
        raise InvalidRequest(
            f"{field}: {name[:80]!r} can't name a checkpoint; use 1 to 128 letters, digits, '_', '-' or single '.', "
            "beginning with a letter, digit or '_' (for example 'step-100')"
        )
    return name


def parse(uri: str, field: str = "path") -> CheckpointUri:
    """Parse a checkpoint's name.

    Raises:
        InvalidRequest: with the forms that are allowed.
    """
    match = _SCHEME.match(uri)
    parts = match["rest"].split("/") if match else []
    if len(parts) == 1:
        return CheckpointUri(name=check_name(parts[0], field))
    if len(parts) == 3 and parts[1] in KINDS and _RUN.fullmatch(parts[0]) and ".." not in parts[0]:
        return CheckpointUri(check_name(parts[2], field), parts[0], cast(CheckpointKind, parts[1]))
    raise InvalidRequest(
        f"{field}: {uri[:200]!r} does not name a checkpoint; use twinkle://RUN/KIND/NAME with KIND one of "
        f"{', '.join(KINDS)}, as save_state and save_weights_for_sampler return it, or twinkle://NAME"
    )


def as_twinkle(uri: str) -> str:
    """The same name under the twinkle:// scheme, for display."""
    return "twinkle://" + uri.removeprefix("tinker://") if uri.startswith("tinker://") else uri
