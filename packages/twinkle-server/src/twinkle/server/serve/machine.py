"""What differs between the machines of a cluster: where the model's files are, and which network joins them."""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import ray

from twinkle.hub import resolve
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.plan import MODEL_FILES

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def on_this_machine(config: ModelConfig, model_id: str | None) -> ModelConfig:
    """With the path of the model's files here, which are downloaded if need be.

    Args:
        model_id: None if the configured path is this machine's.

    Raises:
        InvalidRequest, NotFound: if the model can't be found here.
    """
    if model_id is None or config.path.is_dir():
        return config
    return replace(config, path=Path(resolve(model_id, kind="model", allow_patterns=MODEL_FILES)))


def use_interface(name: str | None) -> None:
    """Have gloo and NCCL talk over this interface: where the machine's default route leads is often not to its peers.

    Args:
        name: None is that of the address which Ray knows the machine by, unless the environment names one.
    """
    found = name or interface_of(cast(str, ray.util.get_node_ip_address()))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if found is not None and (name is not None or variable not in os.environ):
            os.environ[variable] = found


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface with an IPv4 address; None if it can't be told."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return None
