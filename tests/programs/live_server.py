"""A Twinkle server that is started as a user starts one: `python -m twinkle.server launch`."""

import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import processes

START_SECONDS = 180
STOP_SECONDS = 60


@dataclass(frozen=True)
class LiveServer:
    """A server that listens."""

    base_url: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        processes.interrupt(self.process, STOP_SECONDS)


def launch(python: str, model: str, hub_root: Path, directory: Path) -> LiveServer:
    """Start a server for `model` on a free port of this machine, and wait until it says that it listens.

    Args:
        python: of the environment that twinkle-server is installed in.
        hub_root: where the model is found by its id.
        directory: receives the configuration, the log and the storage.

    Raises:
        processes.ProgramFailed: it ended, or did not listen in time; with what it wrote.
    """
    port = _free_port()
    config, log = directory / "server_config.yaml", directory / "server.log"
    config.write_text(
        f"model: {{model_id: {model}, use_megatron: false, torch_dtype: float32}}\n"
        f"server: {{host: 127.0.0.1, port: {port}, num_replicas: 1}}\n"
        "ray: {num_gpus: 0}\n"
        f"storage: {{root: {directory / 'storage'}}}\n",
        encoding="utf-8",
    )
    command = [python, "-m", "twinkle.server", "launch", "--config", str(config)]
    environment = {
        **os.environ,
        "TWINKLE_HUB_ROOT": str(hub_root),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    server = LiveServer(
        f"http://127.0.0.1:{port}", processes.start(command, directory, environment, log), log
    )
    deadline = time.monotonic() + START_SECONDS
    while "Twinkle listens" not in log.read_text(encoding="utf-8", errors="replace"):
        if server.process.poll() is not None or time.monotonic() > deadline:
            server.stop()
            written = log.read_text(encoding="utf-8", errors="replace")
            raise processes.ProgramFailed(f"the server did not start:\n{written}")
        time.sleep(0.2)
    return server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
