"""The processes of a server that a test started, for tests that kill them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import running_server

WAIT_SECONDS = 120


def processes_of(server: running_server.RunningServer, name: str) -> set[int]:
    """Those that the server started whose command line begins with `name`."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(entry.name)] = command.decode(errors="replace")
    found = {server.process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid for pid in found if names.get(pid, "").startswith(name)}


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {WAIT_SECONDS} s"
        time.sleep(0.05)


def times_back(server: running_server.RunningServer) -> int:
    return sum("The model is back after" in line for line in server.lines)
