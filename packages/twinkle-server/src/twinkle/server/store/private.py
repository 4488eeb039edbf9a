"""Files and directories that only the server's user can access, whatever the umask and whoever made them."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger("twinkle.server")

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_directory(path: Path) -> Path:
    """Make a directory that nobody else can enter, or tighten an existing one."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _tighten(path)
    return path


def private_file(path: Path) -> None:
    """Make an empty file that nobody else can read, or tighten an existing one.

    An existing one is not opened: closing it would release this process's locks on it.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        _tighten(path)


def tighten_if_there(path: Path) -> None:
    if path.exists():
        _tighten(path)


def _tighten(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & _OTHERS:
        return
    try:
        path.chmod(mode & ~_OTHERS)
    except OSError as error:  # another user's, which the operator chose
        log.warning(
            "%s can be read by others, and that can't be changed (%s): see to it that only the server's user can",
            path,
            error.strerror or error,
        )
