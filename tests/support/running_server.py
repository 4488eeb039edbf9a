"""Starts a real server as a user would, as a program of its own."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 180
STOP_SECONDS = 60


@dataclass
class RunningServer:
    """A server that has said that it is ready.

    Attributes:
        lines: what it has written to stderr so far.
    """

    base_url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    storage: Path = Path()

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


def launch(
    config: Path, hub_root: Path, script: Path | None = None, more: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`twinkle-server launch`, or a script that does the same, without waiting.

    Args:
        more: variables of its environment.
    """
    program = ["-m", "twinkle.server", "launch", "--config"] if script is None else [str(script)]
    return subprocess.Popen(
        [sys.executable, *program, str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TWINKLE_HUB_ROOT": str(hub_root), **(more or {})},
    )


def start(
    config: Path,
    hub_root: Path,
    port: int,
    script: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> RunningServer:
    """Launch and wait until it says that it listens."""
    server = RunningServer(f"http://127.0.0.1:{port}", launch(config, hub_root, script, more))
    ready = threading.Event()
    threading.Thread(target=_read, args=(server, ready), daemon=True).start()
    ready.wait(START_SECONDS)
    if not any("Twinkle listens" in line for line in server.lines):
        server.process.kill()
        raise AssertionError("the server did not start:\n" + "".join(server.lines))
    return server


def _read(server: RunningServer, ready: threading.Event) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.lines.append(line)
        if "Twinkle listens" in line:
            ready.set()
    ready.set()


def free_port() -> int:
    """A port that nobody listens on just now.

    None that the system or Ray gives to whoever asks for any: a server that is started again is to find it free.
    """
    while not is_free(port := random.SystemRandom().randrange(20_000, 32_000)):
        pass
    return port


def is_free(port: int) -> bool:
    """Whether nobody listens on it."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def write_config(
    directory: Path,
    port: int,
    model_id: str = "Qwen/Qwen3.5-4B",
    extra: str = "",
    layout: Mapping[str, int] | None = None,
    replicas: int = 1,
    model_extra: str = "",
    sampler: str = "",
    ray: str = "num_gpus: 0",
    root: str = "",
) -> Path:
    """The mission's flat configuration, on loopback and in a directory of the test's own.

    Args:
        extra: lines at the end, beginning in the section `storage`.
        model_extra: lines of the section `model`.
        sampler, ray: these sections, in YAML's flow style (`ray` without its braces).
        replicas: processes that answer HTTP.
        root: `storage.root`; default: a directory in `directory`.
        layout: ranks (`tensor_parallel_size` and the like), with Megatron unless each holds the whole model.
    """
    path = directory / "server_config.yaml"
    spread = "".join(f"  {name}: {size}\n" for name, size in (layout or {}).items())
    use_megatron = not {"data_parallel_size", "shard_base"}.issuperset(layout or {})
    path.write_text(
        f"model:\n  model_id: {model_id}\n  use_megatron: {str(use_megatron).lower()}\n"
        f"{spread}{model_extra}  torch_dtype: float32\n"
        f"server:\n  host: 127.0.0.1\n  port: {port}\n  num_replicas: {replicas}\n"
        f"ray: {{{ray}}}\n"
        f"{f'sampler: {sampler}' if sampler else ''}\n"
        f"storage:\n  root: {root or directory / 'storage'}\n{extra}",
        encoding="utf-8",
    )
    return path
