"""The server's process: starts Ray and Serve, reports when it is ready, waits, and ends both.

`supervisor.py` starts it, and restarts it when it or Ray has ended.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from importlib import import_module
from types import FrameType
from typing import Any, cast

import ray

from twinkle.protocol.errors import ServerFault, TwinkleError
from twinkle.server.config import ServerConfig
from twinkle.server.keys import with_auth_mode
from twinkle.server.plan import Plan, make_plan
from twinkle.server.serve.ray_place import ray_directory
from twinkle.server.serve.supervised import Supervised, say

log = logging.getLogger("twinkle.server")

# Earlier versions have no tokens.
_RAY_WITH_TOKENS = [2, 52]
# How Ray says that a part of it took too long.
_BUSY = re.compile("time(d )?out|within|deadline", re.IGNORECASE)

_LOGGING = {"log_level": "ERROR", "enable_access_log": False}

# Ray's own processes are probed this often, and count as ended after this many failures in a row.
_PROBE_SECONDS = 1.0
_PROBES = 2


def main() -> int:
    """Serve until the supervisor or a signal asks to stop. Returns the exit code."""
    os.umask(0o077)  # only this user may read the files it writes
    supervised = Supervised(int(sys.argv[1]))
    ready, stop, over = threading.Event(), threading.Event(), threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            return  # sent by the supervisor, and perhaps also by a shutdown of the machine
        stop.set()
        if not ready.is_set():
            raise KeyboardInterrupt  # interrupts whatever is being waited for

    def take_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)

    take_signals()
    try:
        # Only a signal interrupts whatever this thread waits for.
        supervised.watch(on_stop=lambda: os.kill(os.getpid(), signal.SIGINT))
        plan = make_plan(with_auth_mode(ServerConfig.model_validate_json(supervised.configuration)))
        _say_what_is_loaded(plan)
        began = time.monotonic()
        # Takes seconds, as do Ray's own processes, which are started meanwhile.
        importing = threading.Thread(target=import_module, args=("twinkle.server.serve.deployments",))
        importing.start()
        _start_ray(plan)
        take_signals()  # Ray's own handler of SIGTERM ends the process with a stack trace
        _watch_ray(supervised, over)
        importing.join()
        _start(plan)
        say(f"Ready after {time.monotonic() - began:.0f} s: a training step and a sample have run.")
        ready.set()
        supervised.ready(plan.config.model_dump_json())
        stop.wait()
        say("Stopping.")
        _close_engine()
    except KeyboardInterrupt:
        say("Stopped before it was ready.")
    except TwinkleError as error:
        supervised.failed(error)
        return 1
    finally:
        stop.set()
        over.set()
        ray.shutdown()
    return 0


def _say_what_is_loaded(plan: Plan) -> None:
    model = plan.model
    ranks = f" ({plan.num_ranks} ranks)" if plan.num_ranks > 1 else ""
    where = f"{plan.num_ranks} GPU{'s' * (plan.num_ranks > 1)}" if plan.gpus_per_rank else f"the CPU{ranks}"
    if not plan.gpus_per_rank and plan.config.ray.num_gpus:
        say(f"ray.num_gpus is {plan.config.ray.num_gpus}, but TWINKLE_DEVICE=cpu: computing on the CPU.")
    say(
        f"Loading {plan.config.model.model_id} from {model.path} in {model.torch_dtype} on {where} "
        f"({plan.backend} backend, {_samplers(plan)})."
    )
    if plan.samplers is None:
        say(f"This server only trains: {plan.why_no_samples}.")


def _samplers(plan: Plan) -> str:
    if plan.samplers is None:
        return "no sampler"
    if not (count := plan.samplers.processes):
        return f"{plan.samplers.engine} sampler"
    gpus = f" on {plan.samplers.all_gpus} further GPUs" if plan.samplers.gpus else ""
    return f"{count} {plan.samplers.engine} sampler{'s' * (count > 1)} with processes of their own{gpus}"


def _start(plan: Plan) -> None:
    """Start ranks, samplers, Serve and the engine; returns when they are ready."""
    # Ray and Serve log each of their own steps; what users want to know is printed here.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from ray import serve
    from ray.util import placement_group

    from twinkle.server.serve.deployments import APP_NAME, build_application
    from twinkle.server.serve.ranks import place_ranks

    # The ranks take longest, so they are started first, and then handed to the engine.
    placement = placement_group(plan.bundles, strategy="PACK")
    ranks = place_ranks(plan, placement)
    serve.start(proxy_location="Disabled", logging_config=_LOGGING)
    try:
        serve.run(
            build_application(plan, placement, ranks),
            name=APP_NAME,
            route_prefix=None,
            logging_config=_LOGGING,
        )
    except RuntimeError as error:
        raise ServerFault(f"the server could not start: {_cause()}") from error
    failure = _engine().start_failure.remote().result(timeout_s=60)
    if failure is not None:
        raise ServerFault(f"the server could not start: {failure.message}")


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


def _start_ray(plan: Plan) -> None:
    _check_ray()
    # Usage reports would be sent over the network without asking the user.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray's processes have a lower priority than all others on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            address="local",  # never joins an existing cluster
            num_cpus=max(os.cpu_count() or 1, len(plan.bundles)),
            num_gpus=int(sum(bundle.get("GPU", 0) for bundle in plan.bundles)),
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


def _cause() -> str:
    """Serve's messages about the deployments that failed."""
    from ray import serve

    from twinkle.server.serve.deployments import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return "Serve knows of no application"
    messages = [status.message for status in application.deployments.values() if status.message]
    return "\n".join(messages) or application.message


def _watch_ray(supervised: Supervised, over: threading.Event) -> None:
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


def _close_engine() -> None:
    """Let the engine finish its writes."""
    try:
        _engine().close.remote().result(timeout_s=30)
    except Exception as error:  # the cluster ends anyway
        log.warning("the engine could not be closed in order: %s", error)


def _engine() -> Any:
    from ray import serve

    from twinkle.server.serve.deployments import APP_NAME

    return cast(Any, serve.get_deployment_handle("engine", APP_NAME))


if __name__ == "__main__":
    sys.exit(main())
