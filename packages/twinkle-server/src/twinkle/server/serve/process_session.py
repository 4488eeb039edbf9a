"""All processes that one process has started, told by the session that it leads: it stays theirs when it has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_GONE_WITHIN_SECONDS = 10.0


def end_session(leader: int) -> None:
    """Kill whatever runs in the session that a process leads, or led, but not the caller; return when it is gone.

    Where there is no /proc, that is what runs in the leader's process group.
    """
    if sys.platform != "linux":
        if leader != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(leader, signal.SIGKILL)
        return
    deadline = time.monotonic() + _GONE_WITHIN_SECONDS
    # Again, until none is left: one that is about to be killed may start another.
    while (running := members(leader) - {os.getpid()}) and time.monotonic() < deadline:
        for pid in running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    _reap(leader)


def members(leader: int) -> set[int]:
    """Processes of a session that run, and those that they started, whatever their session is (Linux alone)."""
    running = [process for process in _processes() if process.state not in "ZX"]
    found = {process.pid for process in running if process.session == leader}
    while more := {process.pid for process in running if process.parent in found} - found:
        found |= more
    return found


def _reap(leader: int) -> None:
    """In a container the caller may be the first process of all, to which those come whose parent has ended."""
    for process in _processes():
        if process.session == leader != process.pid and process.parent == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


@dataclass(frozen=True)
class _Process:
    pid: int
    state: str
    parent: int
    session: int


def _processes() -> list[_Process]:
    found: list[_Process] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                stat = (entry / "stat").read_text(errors="replace")
                state, parent, _group, session = stat.rpartition(")")[2].split()[:4]
                found.append(_Process(int(entry.name), state, int(parent), int(session)))
    return found
