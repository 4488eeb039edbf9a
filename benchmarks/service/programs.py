"""The programs that a measurement is made of, each a process of its own: a server, its load, and bare loops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BENCHMARKS = Path(__file__).parents[1]
START_SECONDS = 300


@dataclass(frozen=True)
class Served:
    """A server that listens.

    Attributes:
        ready_seconds: from its command to "Twinkle listens".
        pid: of its supervisor.
    """

    base_url: str
    ready_seconds: float
    pid: int


@contextlib.contextmanager
def server(model: Path, directory: Path, **sections: dict[str, Any]) -> Generator[Served]:
    """`twinkle-server launch` on a free port of this machine; ended as by Ctrl-C.

    Args:
        sections: of its configuration, beside what is needed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "model": {"model_id": f"file://{model}", **sections.pop("model", {})},
        "server": {"port": port},
        "storage": {"root": str(directory / f"storage-{port}")},
        **sections,
    }
    path = directory / f"server-{port}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "twinkle.server", "launch", "--config", str(path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_until_it_listens(process)
        yield Served(f"http://127.0.0.1:{port}", time.monotonic() - began, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _wait_until_it_listens(process: subprocess.Popen[str]) -> None:
    said: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:  # to its end, lest the server wait for a reader
            said.append(line)
            if "Twinkle listens" in line:
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    if not ready.wait(START_SECONDS) or process.poll() is not None:
        raise RuntimeError("the server did not start:\n" + "".join(said))


def load(kind: str, base_url: str, **settings: Any) -> dict[str, Any]:
    """`python -m service.load`."""
    return _run("service.load", kind, {"base_url": base_url, **settings})


def bare(kind: str, **settings: Any) -> dict[str, Any]:
    """`python -m service.bare`."""
    return _run("service.bare", kind, settings)


def _run(module: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    options: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        options += [flag] if value is True else [] if value is False else [flag, str(value)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, kind, *options],
        cwd=BENCHMARKS,
        env={**os.environ, "TINKER_TELEMETRY": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def process_of(supervisor: int, command: str) -> int:
    """The process of a server on this machine whose command has this in it (Linux). There must be one."""
    seen: dict[int, tuple[str, int, int]] = {}  # pid -> command, session, parent
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                said = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                seen[int(entry.name)] = said, int(fields[3]), int(fields[1])
    sessions = {pid for pid, (_, _, parent) in seen.items() if parent == supervisor}
    [found] = [pid for pid, (said, session, _) in seen.items() if command in said and session in sessions]
    return found
