"""Files encrypted with age (https://age-encryption.org) to clients' public keys; the server can't decrypt them.

`weights.download` of tinker-cookbook asks for it when given a training checkpoint, with a key of its own. Needs
`pyrage`, an extra. Defines what a recipient is, and the suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from twinkle.protocol.errors import InvalidRequest

SUFFIX = ".age"
MAX_RECIPIENTS = 32
_FIELD = "age_encryption_recipients"


def check_recipients(recipients: Sequence[str]) -> None:
    """
    Raises:
        InvalidRequest: if one is not an age public key (`age1...`), there are too many, or pyrage is not installed.
    """
    if len(recipients) > MAX_RECIPIENTS:
        raise InvalidRequest(f"{_FIELD}: {len(recipients)} are too many; give at most {MAX_RECIPIENTS}")
    _read(_pyrage(), recipients)


def encrypt_files(directory: Path, recipients: Sequence[str]) -> None:
    """Replace each file in a directory by `NAME.age`.

    Raises:
        InvalidRequest: as `check_recipients`.
    """
    pyrage = _pyrage()
    keys = _read(pyrage, recipients)
    for path in sorted(directory.iterdir()):
        pyrage.encrypt_file(str(path), str(path.with_name(path.name + SUFFIX)), keys)
        path.unlink()


def _pyrage() -> Any:
    try:
        return import_module("pyrage")
    except ImportError as error:
        raise InvalidRequest(
            f"{_FIELD}: this server can't encrypt exports, since it has no pyrage (on the server: pip install "
            "'twinkle-server[age]'); leave it out, and encrypt what you download. tinker-cookbook's weights.download "
            "asks for it with paths of save_state: give it one of save_weights_external instead"
        ) from error


def _read(pyrage: Any, recipients: Sequence[str]) -> list[Any]:
    keys: list[Any] = []
    for recipient in recipients:
        try:
            keys.append(pyrage.x25519.Recipient.from_str(recipient))
        except pyrage.RecipientError as error:
            raise InvalidRequest(
                f"{_FIELD}: {recipient[:100]!r} is no public key of age's ({error}); they begin with age1"
            ) from error
    return keys
