"""The server as its user starts it: checks what can be checked, then runs the server's process under a supervisor.

Deliberately light: this process lives as long as the server, and neither Ray nor the model can end it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.config import ServerConfig, load_config
from twinkle.server.logs import shown
from twinkle.server.serve.ray_place import joining_environment, ray_environment
from twinkle.server.serve.supervised import say
from twinkle.server.serve.supervisor import Supervisor
from twinkle.server.serve.tls import check_tls

# -P: no modules are imported from the directory that the server is started in.
_COMMAND = (sys.executable, "-P", "-m", "twinkle.server.serve.cluster")

# A killed server holds its port until its last thread is gone, which takes a while on a busy machine.
_PORT_SECONDS = 5.0


class TwinkleServer:
    """The server: `TwinkleServer.from_config('server_config.yaml').run()`."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> TwinkleServer:
        """
        Raises:
            InvalidRequest: says what is wrong in the file.
        """
        return cls(load_config(path))

    def run(self) -> None:
        """Start, print where the server listens once it is ready, and serve until Ctrl-C or SIGTERM.

        Once it has been ready, it is restarted whenever it ends unasked, as when Ray's head or the server's own process
        is killed. The configuration stays the same, including who may use it.

        Raises:
            InvalidRequest, NotFound: if it can't start as configured (port taken, model not found, ...).
            ServerFault: if the model could not be loaded or its first step failed. Nothing is left running.
        """
        if self.config.has_door:
            _forget_wishes(self.config)
        with shown(self.config.log):
            Supervisor(
                _COMMAND,
                self.config.as_json(),
                check=self._check,
                surroundings=ray_environment if self.config.ray.address is None else joining_environment,
                on_ready=lambda configuration: say(
                    _ready_lines(ServerConfig.model_validate_json(configuration))
                ),
            ).run()

    def _check(self) -> None:
        for check in checks(self.config):
            check()


def _forget_wishes(config: ServerConfig) -> None:
    """A server that its operator starts has the engines that its file lists, drained before or not."""
    from twinkle.server.serve.fleet_plan import server_id
    from twinkle.server.store.database import Database

    server, database = server_id(config), Database(config.storage.url)
    try:
        for row in database.engines(server):
            if not row.is_added:
                database.change_engine(server, row.name, wanted="run")
    finally:
        database.close()


def checks(config: ServerConfig) -> list[Callable[[], None]]:
    """What can be checked before anything is started; each check raises `InvalidRequest`."""
    server = config.server
    # In a cluster, a killed server's gateways may still answer there: they go when this one comes.
    found = [] if config.ray.address else [partial(_check_port, server.host, server.port)]
    if server.tls is not None:
        found.append(partial(check_tls, *server.tls))
    if config.storage.shared_url is not None:
        found.append(partial(_check_root, config.storage.shared_url))
    if config.storage.is_on_database_server:
        found.append(partial(_check_database, config.storage.url))
    return found


def _check_root(url: str) -> None:
    from twinkle.server.store.shared_files import check_shared

    check_shared(url)


def _check_database(url: str) -> None:
    from twinkle.server.store.database import Database  # imports sqlalchemy, which takes a moment

    Database(url).close()


def _check_port(host: str, port: int) -> None:
    deadline = time.monotonic() + _PORT_SECONDS
    while (error := _try_port(host, port)) is not None:
        if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
            raise InvalidRequest(
                f"server.port: can't listen on {host}:{port} ({error.strerror}); "
                "choose another port, or end the program that has it"
            ) from error
        time.sleep(0.1)


def _try_port(host: str, port: int) -> OSError | None:
    """Why nothing can listen there now; None if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _ready_lines(config: ServerConfig) -> str:
    server = config.server
    shown = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    scheme = "https" if server.tls else "http"
    return "\n".join(
        [
            *_access_lines(config),
            f"Twinkle listens on {server.host}:{server.port}; clients use {scheme}://{shown}:{server.port}",
        ]
    )


def _access_lines(config: ServerConfig) -> list[str]:
    """Who may use the server, with warnings."""
    host = config.server.host
    others = host != "localhost" and not _is_loopback(host)
    if config.auth.mode == "keys":
        lines = ["Only keys are let in that were made with: twinkle-server keys create --config FILE"]
        if others and not config.server.tls:
            lines.append(
                f"WARNING: {host} is not this machine alone, and keys travel in the clear: set server.tls_certificate "
                "and server.tls_key, or let only a proxy with TLS reach this port."
            )
        return lines
    lines = ["Open mode: any API key is accepted, and each sees only its own."]
    if others:
        lines.append(
            f"WARNING: WHOEVER REACHES {host}:{config.server.port} CAN USE THIS SERVER, with no key at all. Make keys "
            "(twinkle-server keys create --config FILE) and start it again, or let it listen on 127.0.0.1."
        )
    return lines


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a host name, whatever it resolves to
