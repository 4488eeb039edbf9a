"""An adversary: faults of a server's processes, disk and network, one after the other, by a seed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import chaos_network
import running_server
from chaos_network import Network
from server_processes import HEAD, processes_of, processes_with, times_ready, wait_for

RANK, ENGINE, GATEWAY = "ray::Rank", "ray::ServeReplica:twinkle:engine", "ray::ServeReplica:twinkle:gateway"

# How long processes are stopped, a database is locked, a disk stays full.
MOMENT_SECONDS = 2.0
# After a fault of a process training is to get somewhere before the next.
_PROCESS_PAUSE_SECONDS = 4.0
_NETWORK_PAUSE_SECONDS = 0.15
_FILLING = "filling"


class Site(Protocol):
    """A server, and what can be done to it.

    Attributes:
        port: where it answers HTTP.
        faults: of its processes and its storage, by name; each returns when the next may come.
    """

    @property
    def port(self) -> int: ...

    @property
    def faults(self) -> dict[str, Callable[[], None]]: ...

    @property
    def lines(self) -> list[str]:
        """What it has written to stderr, whichever process it was."""
        ...


class OneMachine:
    """A server that can be killed and started again, on a port of its own."""

    def __init__(self, config: Path, hub_root: Path, port: int, storage: Path, has_own_disk: bool) -> None:
        self._config, self._hub_root, self.port = config, hub_root, port
        self.storage = storage
        self._has_own_disk = has_own_disk
        self.server = running_server.start(config, hub_root, port)
        self._said: list[str] = []

    @property
    def faults(self) -> dict[str, Callable[[], None]]:
        faults: dict[str, Callable[[], None]] = {
            "rank killed": lambda: self.kill_one(RANK),
            "engine killed": lambda: self.kill_one(ENGINE),
            "gateway killed": lambda: self.kill_one(GATEWAY),
            "rank stopped for 2 s": lambda: self.stop_for_a_moment(RANK),
            "engine stopped for 2 s": lambda: self.stop_for_a_moment(ENGINE),
            "database locked for 2 s": self.lock_database,
            "whole server killed": self.kill_all,
            "Ray's head killed": self.kill_head,
        }
        return faults | ({"disk full for 2 s": self.fill_disk} if self._has_own_disk else {})

    @property
    def lines(self) -> list[str]:
        """What it has written to stderr, whichever process it was."""
        return [*self._said, *self.server.lines]

    def kill_all(self) -> None:
        """Every process of the server at once, as if the machine had gone down; then it is started again."""
        kill(processes_of(self.server, ""))
        self.server.process.wait(30)
        self._said += self.server.lines
        self.server = running_server.start(self._config, self._hub_root, self.port)

    def kill_one(self, name: str) -> None:
        """One process, which the server replaces by itself."""
        found = processes_of(self.server, name)
        if found:
            kill({min(found)})
            wait_for(f"another {name}", lambda: bool(processes_of(self.server, name) - found))

    def kill_head(self) -> None:
        """Ray's head: what is left of the server is of no use, and its supervisor starts it again."""
        before = times_ready(self.server)
        kill(processes_with(self.server, HEAD))
        wait_for("the server after its head was killed", lambda: times_ready(self.server) > before)

    def stop_for_a_moment(self, name: str) -> None:
        stop_for_a_moment(processes_of(self.server, name))

    def lock_database(self) -> None:
        with contextlib.closing(sqlite3.connect(self.storage / "twinkle.sqlite", timeout=30)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(MOMENT_SECONDS)
            connection.rollback()

    def fill_disk(self) -> None:
        """Until there is room for nothing, not even in what files have begun; for a moment."""
        path = self.storage / _FILLING
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 2**20)
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while True:
                file.write(b"\0")
        time.sleep(MOMENT_SECONDS)
        path.unlink()

    def close(self) -> None:
        self.server.stop()


class Adversary(threading.Thread):
    """Injects faults until it is told to stop, or so many have been; `done` is set then."""

    def __init__(self, site: Site, network: Network, seed: int, faults: int) -> None:
        super().__init__(daemon=True)
        self._network = network
        self._random = random.Random(seed)
        self._faults = faults
        self._of_processes = site.faults
        self.injected: Counter[str] = Counter()
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for kind in self._kinds():
                self._inject(kind)
        except BaseException as error:  # told by whoever waits
            self.error = error
        finally:
            self._network.faults.clear()
            self.done.set()

    def _kinds(self) -> Iterator[str]:
        """Five of the network to one of the rest, of which each kind comes in turn, so that none is left out."""
        of_processes = list(self._of_processes)
        self._random.shuffle(of_processes)
        for i in range(self._faults):
            if i % 6 == 5:
                yield of_processes[i // 6 % len(of_processes)]
            else:
                yield self._random.choice(chaos_network.KINDS)

    def _inject(self, kind: str) -> None:
        if kind in self._of_processes:
            self._of_processes[kind]()
            self.injected[kind] += 1
            time.sleep(self._random.uniform(1.0, _PROCESS_PAUSE_SECONDS))
            return
        before = len(self._network.injected)
        self._network.faults.append(kind)
        wait_for("a request", lambda: len(self._network.injected) > before)
        self.injected[kind] += 1
        time.sleep(self._random.uniform(0.0, 2 * _NETWORK_PAUSE_SECONDS))


@contextlib.contextmanager
def own_disk(directory: Path, megabytes: int) -> Generator[bool]:
    """A small file system at `directory`, where this user may make one; says whether it is there."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=False)


def stop_for_a_moment(pids: set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(MOMENT_SECONDS)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
