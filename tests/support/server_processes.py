"""The processes of a server that a test started, for tests that kill them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import running_server

WAIT_SECONDS = 120

# Parts of command lines: Ray's head, its process on this machine, and the server's own process, which starts them.
HEAD, RAYLET, CLUSTER = "gcs_server", "raylet/raylet", "twinkle.server.serve.cluster"


class Started(Protocol):
    """A program that a test started: a server, say."""

    @property
    def process(self) -> subprocess.Popen[Any]: ...


def processes_of(server: Started, name: str, part: str = "") -> set[int]:
    """Those that the program started, itself included, whose command line begins with `name` and has `part` in it."""
    commands = _commands(server).items()
    return {pid for pid, command in commands if command.startswith(name) and part in command}


def processes_with(server: Started, part: str) -> set[int]:
    """The same of those that have `part` anywhere in their command line."""
    return {pid for pid, command in _commands(server).items() if part in command}


def _commands(server: Started) -> dict[int, str]:
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            commands[int(entry.name)] = command.decode(errors="replace")
    found = {server.process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: commands.get(pid, "") for pid in found}


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {WAIT_SECONDS} s"
        time.sleep(0.05)


def times_back(server: running_server.RunningServer) -> int:
    return sum("The model is back after" in line for line in server.lines)


def times_started_again(server: running_server.RunningServer) -> int:
    """How often the supervisor has begun to start the server again."""
    return sum("starting the server again" in line for line in server.lines)


def times_ready(server: running_server.RunningServer) -> int:
    return sum("Twinkle listens" in line for line in server.lines)
