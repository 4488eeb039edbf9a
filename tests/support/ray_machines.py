"""A Ray cluster of several machines, as its users start it: here they are processes of one, with own addresses."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import running_server
import server_processes

# What `ray` on the command line runs.
_RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")


@dataclass
class Machine:
    """One `ray start`, with all that it has started."""

    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """As if its power failed."""
        doomed = server_processes.processes_with(self, "")
        self.process.send_signal(signal.SIGSTOP)  # it would restart nothing, but let it see nothing either
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class RayCluster:
    """
    Attributes:
        environment: for everything that joins it.
    """

    directory: Path
    port: int = field(default_factory=running_server.free_port)
    environment: dict[str, str] = field(default_factory=dict[str, str])
    machines: list[Machine] = field(default_factory=list[Machine])

    @classmethod
    def start(cls, hub_root: Path, num_cpus: int) -> RayCluster:
        """Its first machine, with Ray's head."""
        # Sockets need a short path.
        cluster = cls(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
        cluster.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "TWINKLE_HUB_ROOT": str(hub_root),
        }
        cluster._add(
            num_cpus,
            "--head",
            f"--port={cluster.port}",
            "--include-dashboard=false",
            f"--temp-dir={cluster.directory}",
        )
        return cluster

    def add(self, ip: str, num_cpus: int) -> Machine:
        """One more machine, at an address of the loopback network."""
        return self._add(num_cpus, f"--address=127.0.0.1:{self.port}", f"--node-ip-address={ip}")

    def _add(self, num_cpus: int, *options: str) -> Machine:
        log = (self.directory / f"machine-{len(self.machines)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [*_RAY, f"--num-cpus={num_cpus}", *options],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        machine = Machine(process)
        self.machines.append(machine)
        server_processes.wait_for(
            "a machine of the cluster",
            lambda: (
                process.poll() is not None or b"This command will now block" in Path(log.name).read_bytes()
            ),
        )
        if process.poll() is not None:
            self.stop()
            raise AssertionError(Path(log.name).read_text(encoding="utf-8"))
        return machine

    def stop(self) -> None:
        for machine in reversed(self.machines):
            if machine.process.poll() is None:
                machine.kill()
