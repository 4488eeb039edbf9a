"""All processes that one process has started, found by the session that it leads, which outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

_GONE_WITHIN_SECONDS = 10.0


def end_session(leader: int) -> None:
    """Kill everything in the session that a process leads, or led, except the caller; return when it is gone."""
    deadline = time.monotonic() + _GONE_WITHIN_SECONDS
    # Repeated until none is left: a process may start another before it is killed.
    while (running := members(leader) - {os.getpid()}) and time.monotonic() < deadline:
        for pid in running:
            with contextlib.suppress(
                ProcessLookupError, PermissionError
            ):  # it has ended, or is another user's
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    # In a container the caller may be process 1, which inherits the children of ended processes.
    for process in psutil.process_iter(["ppid"]):
        if process.pid != leader and process.info["ppid"] == os.getpid() and _session(process.pid) == leader:
            with contextlib.suppress(ChildProcessError):  # another thread has waited for it
                os.waitpid(process.pid, os.WNOHANG)


def members(leader: int) -> set[int]:
    """Running processes of a session, and those they started, whatever session these are in."""
    ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    processes = psutil.process_iter(["ppid", "status"])
    parents = {
        process.pid: process.info["ppid"] for process in processes if process.info["status"] not in ended
    }
    found = {pid for pid in parents if _session(pid) == leader}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):  # it has ended, or is another user's
        return None
