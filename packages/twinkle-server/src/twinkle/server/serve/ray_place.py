"""The place of one start of Ray: a directory that only the server's user can enter, and the environment for it.

Anybody who can talk to Ray can run code as the server's user. So each start has its own token, which all of Ray's
processes check, its own directory for sockets and files, and ports on the loopback interface only. Settings for other
programs or clusters don't change that. (In a cluster that the server joins, all that is up to whoever started it.)
Doesn't import Ray, whose settings must be there before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from twinkle.protocol.errors import ServerFault

_PREFIX = "twinkle-ray-"
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_PLACE = "TWINKLE_RAY_PLACE"
# A thread that calls Ray when it has ended, as one that an engine is being started on, must not start another.
_NEVER_BY_ITSELF = {"RAY_ENABLE_AUTO_CONNECT": "0"}

# A socket's path has at most 107 bytes (macOS: 103). Ray adds this many to its directory; the ranks' are shorter.
_LONGEST_SOCKET = 103
_OF_RAY = len("/r/session_2026-11-30_20-24-10_206472_1234567/sockets/plasma_store")
_OF_RANKS = len("/twinkle-12345678/calls")

# Variables that would make this start join another cluster, or use another's token, address, directory or job.
_NOT_OURS = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_GCS_SERVER_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_REDIS_ADDRESS",
    "RAY_RUNTIME_ENV",
    "RAY_TMPDIR",
)


@contextmanager
def ray_environment(variables: Mapping[str, str] = os.environ) -> Generator[dict[str, str]]:
    """The environment for one start, with a directory that exists while the block runs.

    Args:
        variables: the caller's environment.

    Raises:
        ServerFault: if the directory can't be made anywhere.
    """
    directory, lock = _make_directory()
    try:
        environment = {name: value for name, value in variables.items() if name not in _NOT_OURS}
        environment |= {
            "RAY_AUTH_MODE": "token",
            _TOKEN_PATH: str(_write_token(directory)),
            _PLACE: str(directory),
            # A single-machine cluster, as on macOS and Windows: all its ports are on the loopback interface.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            **_NEVER_BY_ITSELF,
        }
        # The ranks of a group connect to each other on this machine too.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        if len(os.fsencode(tempfile.gettempdir())) + _OF_RANKS > _LONGEST_SOCKET:
            environment["TMPDIR"] = str(directory)
        yield environment
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


@contextmanager
def joining_environment(variables: Mapping[str, str] = os.environ) -> Generator[dict[str, str]]:
    """The environment for joining a cluster that others have started: its token, address and directory are theirs."""
    yield {name: value for name, value in variables.items() if name != _PLACE} | _NEVER_BY_ITSELF


def place() -> Path | None:
    """The directory, in a process that was started with an environment of the server's own; otherwise None."""
    path = os.environ.get(_PLACE)
    return None if path is None else Path(path)


def ray_directory() -> Path:
    """Ray's own directory, in such a process. Ray lets everybody read it, but the one around it keeps others out."""
    directory = place()
    assert directory is not None, "the supervisor makes one"
    return directory / "r"


def _write_token(directory: Path) -> Path:
    path = directory / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _make_directory() -> tuple[Path, int]:
    """Make a directory; returns it and the descriptor of the lock that marks it as in use."""
    errors: list[str] = []
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
        if len(os.fsencode(f"{base}/{_PREFIX}12345678")) + _OF_RAY > _LONGEST_SOCKET:
            errors.append(f"{base}: too long for the paths of sockets")
            continue
        try:
            _remove_left(Path(base))
            # Only its owner can enter it, whatever the umask.
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            return directory, _lock(directory)
        except OSError as error:
            errors.append(f"{base}: {error.strerror or error}")
    raise ServerFault(
        f"Ray needs a directory for its sockets, and there is no place for one ({'; '.join(errors)}): set TMPDIR to a "
        "directory with a short path that this user may write to"
    )


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_left(base: Path) -> None:
    """Delete the directories of killed supervisors of this user: their locks are gone with them."""
    for directory in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or in use
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(directory / "lock", os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)
