"""How the ranks of a group find each other: at a file on one machine, or at a store that one of them holds open."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from twinkle.server.backends.protocol import ModelConfig

_TCP = "tcp://"

_TCPStore: Any = cast(Any, dist).TCPStore  # documented, but not among the exported names


def open_store(host: str) -> tuple[object, str]:
    """A store for ranks on several machines, and the rendezvous that leads to it. It lives as long as it is held.

    Args:
        host: address of this machine; the store listens on it alone.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    # The store closes the socket. No port is free for a moment, as it would be if it were found first and used later.
    store = _TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"{_TCP}{host}:{port}"


def meet(config: ModelConfig, backend: str, timeout: timedelta) -> None:
    """`init_process_group` for the ranks of `config`: waits until all are there.

    Args:
        backend: "gloo" or "nccl".
        timeout: of this and of each later collective.
    """
    rendezvous = config.rendezvous
    method: str | None = rendezvous
    store: Any = None
    if rendezvous is None:
        store = cast(Any, dist).HashStore()  # torch needs one even for a group of one
    elif rendezvous.startswith(_TCP):
        host, _, port = rendezvous.removeprefix(_TCP).rpartition(":")
        store, method = _TCPStore(host, int(port), is_master=False, timeout=timeout), None
    dist.init_process_group(
        backend,
        init_method=method,
        store=store,
        world_size=config.num_ranks,
        rank=config.rank,
        timeout=timeout,
    )
