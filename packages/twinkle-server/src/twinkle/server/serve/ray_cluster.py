"""The Ray cluster that the server runs in: one of its own, or one that others have started; and noticing its end."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.server.serve.ray_place import ray_directory
from twinkle.server.serve.supervised import Supervised, say

# Earlier versions have no tokens.
_RAY_WITH_TOKENS = [2, 52]
# How Ray says that a part of it took too long.
_BUSY = re.compile("time(d )?out|within|deadline", re.IGNORECASE)

# Ray's own processes are probed this often, and count as ended after this many failures in a row.
_PROBE_SECONDS = 1.0
_PROBES = 2

# How long a cluster may take to find room, while it is being extended, say.
_ROOM_SECONDS = 30.0


def _check_ray() -> None:
    """
    Raises:
        ServerFault: if this version of Ray would run code for anybody who reaches its ports.
    """
    numbers = [int(number) for number in re.findall(r"\d+", ray.__version__)[:2]]
    if numbers < _RAY_WITH_TOKENS:
        raise ServerFault(
            f"ray {ray.__version__} asks nobody for a token; install ray>={'.'.join(map(str, _RAY_WITH_TOKENS))}"
        )
    raylet = cast(Any, import_module("ray._raylet"))
    if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        raise ServerFault(
            f"ray {ray.__version__} does not ask for a token, though RAY_AUTH_MODE is token; install another version"
        )


def start_ray(bundles: Sequence[Mapping[str, float]]) -> None:
    """Start a cluster of the server's own, on this machine.

    Raises:
        ServerFault: if that fails.
    """
    _check_ray()
    # Usage reports would be sent over the network without asking the user.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray's processes have a lower priority than all others on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            address="local",  # never joins an existing cluster
            num_cpus=max(os.cpu_count() or 1, int(sum(bundle["CPU"] for bundle in bundles))),
            num_gpus=int(sum(bundle.get("GPU", 0) for bundle in bundles)),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=True,
            _temp_dir=str(ray_directory()),
        )
    except Exception as error:
        said = f"Ray could not be started on this machine ({type(error).__name__}: {error})"
        if _BUSY.search(str(error)):
            said += "; its processes have half a minute, which may be too little while others keep the machine busy"
        raise ServerFault(said) from error
    _warn_of_open_ports()


def _warn_of_open_ports() -> None:
    others = {host for host, _port in _ray_addresses().values() if not ipaddress.ip_address(host).is_loopback}
    if others:
        say(
            f"WARNING: Ray listens on {', '.join(sorted(others))}, not on this machine's loopback alone. It asks for a "
            "token; keep its ports behind a firewall all the same."
        )


def join_ray(address: str) -> int:
    """Join a cluster that runs already, with the token of this environment; returns how many GPUs it has.

    Raises:
        InvalidRequest: if there is none at that address, or it refuses.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _check_listens(address)  # Ray itself tries for minutes
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True, namespace="twinkle")
    except Exception as error:
        raise InvalidRequest(
            f"ray.address: no Ray cluster could be joined at {address} ({type(error).__name__}: {error}); begin one "
            "with 'ray start --head', join it on this machine with 'ray start --address=HOST:PORT' and the same "
            "RAY_AUTH_TOKEN, or leave ray.address out"
        ) from error
    raylet = cast(Any, import_module("ray._raylet"))
    if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        say(
            "WARNING: this Ray cluster asks nobody for a token: WHOEVER REACHES ITS PORTS CAN RUN PROGRAMS ON ALL ITS "
            "MACHINES. Start it with RAY_AUTH_MODE=token."
        )
    return int(cast(Any, ray).cluster_resources().get("GPU", 0))


def _check_listens(address: str) -> None:
    """
    Raises:
        OSError, ValueError: if nobody listens at host:port.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def check_room(
    placement: PlacementGroup, bundles: Sequence[Mapping[str, float]], key: str = "ray.address"
) -> None:
    """Wait until the cluster has set aside what ranks and samplers need.

    Args:
        key: of the configuration, that the error names.

    Raises:
        InvalidRequest: if it has no room for that.
    """
    if placement.wait(_ROOM_SECONDS):
        return
    asked = ", ".join(_resources(bundle) for bundle in bundles)
    free = cast(Any, import_module("ray._private.state")).available_resources_per_node()
    there = "; ".join(_resources(resources) for resources in free.values())
    raise InvalidRequest(
        f"{key}: the cluster has no room: needed are {asked}, each on one machine; free on its machines are "
        f"{there}; add machines, or lower the sizes in the sections model and sampler"
    )


def _resources(resources: Mapping[str, float]) -> str:
    shown = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return " and ".join(shown) or "nothing"


def watch_ray(supervised: Supervised, over: threading.Event) -> None:
    """Until `over` is set, end this process when Ray's head, or its raylet here, has ended.

    Ray itself waits a minute for its head, and then kills each process that was connected to it.
    """
    addresses = _ray_addresses()

    def watch() -> None:
        failures = 0
        while not over.wait(_PROBE_SECONDS):
            ended = [name for name, address in addresses.items() if not _listens(address)]
            failures = failures + 1 if ended else 0
            if failures == _PROBES:
                supervised.failed(ServerFault(f"{ended[0]} has ended"))
                # An orderly shutdown would wait for Ray; the supervisor kills what is left.
                os._exit(1)

    threading.Thread(target=watch, name="watch Ray", daemon=True).start()


def _ray_addresses() -> dict[str, tuple[str, int]]:
    """The addresses of the processes that Ray can't do without."""
    context = cast(Any, ray.get_runtime_context())
    host, _, port = str(context.gcs_address).rpartition(":")
    addresses = {"Ray's head": (host.strip("[]"), int(port))}
    for node in cast(list[dict[str, Any]], cast(Any, ray).nodes()):
        if node["NodeID"] == context.get_node_id():
            addresses["Ray's raylet"] = (node["NodeManagerAddress"], node["NodeManagerPort"])
    return addresses


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
