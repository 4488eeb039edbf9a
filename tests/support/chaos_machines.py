"""A server of two ranks and two samplers on two machines, with PostgreSQL and S3, and what can be done to all that."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import running_server
from chaos_faults import MOMENT_SECONDS, kill, stop_for_a_moment
from ray_machines import Machine, RayCluster
from running_postgresql import RunningPostgresql
from running_s3 import RunningS3
from server_processes import processes_of, wait_for

RANK, SAMPLER = "ray::Rank", "ray::SamplerProcess"

# Each machine alone has room for all ranks and samplers.
_CPUS = 4


class SeveralMachines:
    """See `chaos_faults.Site`."""

    def __init__(self, directory: Path, hub_root: Path, postgresql: RunningPostgresql, s3: RunningS3) -> None:
        self.port = running_server.free_port()
        self._hub_root, self._postgresql, self._s3 = hub_root, postgresql, s3
        self._cluster = RayCluster.start(hub_root, num_cpus=0)
        self._addresses = itertools.count(21)
        self._machines = [self._add_machine() for _ in range(2)]
        self._config = running_server.write_config(
            directory,
            self.port,
            extra=(
                f"  local_root: {directory / 'local'}\n  database_url: {postgresql.new_database()}\n"
                "  snapshot_seconds: 1\n"
            ),
            layout={"data_parallel_size": 2},
            sampler="{replicas: 2}",
            ray=f'num_gpus: 0, address: "127.0.0.1:{self._cluster.port}", network_interface: lo',
            root=s3.new_root(),
        )
        self._said: list[str] = []
        try:
            self.server = self._start()
        except BaseException:
            self._cluster.stop()
            raise

    @property
    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "rank killed": lambda: self._kill_one(RANK),
            "sampler killed": lambda: self._kill_one(SAMPLER),
            "engine killed": lambda: self._kill_one(self._replica("engine")),
            "gateway of another machine killed": lambda: self._kill_one(self._replica("gateway")),
            "rank stopped for 2 s": lambda: stop_for_a_moment(self._processes(RANK)),
            "sampler stopped for 2 s": lambda: stop_for_a_moment(self._processes(SAMPLER)),
            "server's own processes killed": self._kill_server,
            "machine lost, and another comes": self._lose_machine,
            "PostgreSQL stopped for 2 s": self._stop_postgresql,
            "S3 stopped for 2 s": self._stop_s3,
        }

    @property
    def lines(self) -> list[str]:
        """What the server has written to stderr, whichever process it was."""
        return [*self._said, *self.server.lines]

    def close(self) -> None:
        self._postgresql.start_if_stopped()
        self._s3.start_if_stopped()
        self.server.stop()
        self._cluster.stop()

    def _start(self) -> running_server.RunningServer:
        return running_server.start(self._config, self._hub_root, self.port, more=self._cluster.environment)

    def _add_machine(self) -> Machine:
        return self._cluster.add(f"127.0.0.{next(self._addresses)}", _CPUS)

    def _replica(self, name: str) -> tuple[str, str]:
        return f"ray::ServeReplica:twinkle-{self.port}-", f":{name}"

    def _processes(self, name: str | tuple[str, str]) -> set[int]:
        """On all machines that run."""
        start, part = name if isinstance(name, tuple) else (name, "")
        found: set[int] = set()
        for machine in self._cluster.machines:
            if machine.process.poll() is None:
                found |= processes_of(machine, start, part)
        return found

    def _kill_one(self, name: str | tuple[str, str]) -> None:
        found = self._processes(name)
        if found:
            kill({min(found)})
            wait_for(f"another {name}", lambda: bool(self._processes(name) - found))

    def _kill_server(self) -> None:
        """What its user started, whose part of the cluster stays; then it is started again."""
        kill(processes_of(self.server, ""))
        self.server.process.wait(30)
        self._said += self.server.lines
        self.server = self._start()

    def _lose_machine(self) -> None:
        lost = self._machines.pop(0)
        lost.kill()
        wait_for(
            "ranks and samplers elsewhere",
            lambda: len(self._processes(RANK)) == len(self._processes(SAMPLER)) == 2,
        )
        self._machines.append(self._add_machine())

    def _stop_postgresql(self) -> None:
        self._postgresql.stop()
        time.sleep(MOMENT_SECONDS)
        self._postgresql.start()

    def _stop_s3(self) -> None:
        self._s3.stop()
        time.sleep(MOMENT_SECONDS)
        self._s3.start()
