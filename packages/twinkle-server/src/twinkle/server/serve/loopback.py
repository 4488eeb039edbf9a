"""Keeps the port that Ray Serve opens in a replica's process on the loopback interface.

A replica takes other deployments' calls on a port of all interfaces, and unpickles what it receives. Newer versions
check Ray's token first, but still nothing outside this machine needs that port, and deployments that call each other
through Ray's actors don't use it. Its address can't be configured.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ALL = ("[::]:", "0.0.0.0:", ":::")


def keep_grpc_local() -> None:
    """From now on, no gRPC server in this process listens on all interfaces."""
    server: Any = import_module("grpc.aio._server").Server
    if hasattr(server, "twinkle_kept_local"):
        return
    for name in ("add_insecure_port", "add_secure_port"):
        setattr(server, name, _on_loopback(getattr(server, name)))
    server.twinkle_kept_local = True


def _on_loopback(add_port: Any) -> Any:
    def add(self: Any, address: str, *more: Any) -> int:
        for everywhere in _ALL:
            if address.startswith(everywhere):
                address = f"127.0.0.1:{address.removeprefix(everywhere)}"
        return add_port(self, address, *more)

    return add
