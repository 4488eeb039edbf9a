"""Starts Ray and Serve for one server, waits, and ends both."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from importlib import import_module
from types import FrameType
from typing import Any, cast

import ray

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.server.config import ServerConfig, load_config
from twinkle.server.keys import with_auth_mode
from twinkle.server.plan import Plan, make_plan
from twinkle.server.serve.tls import check_tls

log = logging.getLogger("twinkle.server")

_LOGGING = {"log_level": "ERROR", "enable_access_log": False}


class TwinkleServer:
    """The server: `TwinkleServer.from_config('server_config.yaml').run()`."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> TwinkleServer:
        """
        Raises:
            InvalidRequest: naming what is wrong in the file.
        """
        return cls(load_config(path))

    def run(self) -> None:
        """Start, say when it is ready and where it listens, and serve until Ctrl-C or SIGTERM.

        Raises:
            InvalidRequest, NotFound: if it can't start as configured (port taken, model not found, ...).
            ServerFault: if the model could not be loaded or its first step failed. Nothing is left running.
        """
        server = self.config.server
        _check_port(server.host, server.port)
        if server.tls is not None:
            check_tls(*server.tls)
        plan = make_plan(with_auth_mode(self.config))
        ready, stop = threading.Event(), threading.Event()

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            stop.set()
            if not ready.is_set():
                raise KeyboardInterrupt  # out of whatever is being waited for

        handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _start(plan)
            ready.set()
            _say(_ready_lines(plan))
            stop.wait()
            _say("Stopping.")
            _close_engine()
        except KeyboardInterrupt:
            _say("Stopped before it was ready.")
        finally:
            ray.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidRequest(
                f"server.port: can't listen on {host}:{port} ({error.strerror}); "
                "choose another port, or end the program that has it"
            ) from error


def _start(plan: Plan) -> None:
    model = plan.model
    where = f"{plan.num_ranks} GPU{'s' * (plan.num_ranks > 1)}" if plan.gpus_per_rank else "the CPU"
    if not plan.gpus_per_rank and plan.config.ray.num_gpus:
        _say(f"ray.num_gpus is {plan.config.ray.num_gpus}, but no GPU was found: computing on the CPU.")
    _say(
        f"Loading {plan.config.model.model_id} from {model.path} in {model.torch_dtype} on {where} "
        f"({plan.backend} backend, {plan.sampler} sampler)."
    )
    began = time.monotonic()
    # Ray's own processes take seconds to start, and so does this.
    importing = threading.Thread(target=import_module, args=("twinkle.server.serve.deployments",))
    importing.start()
    _start_ray(plan)
    importing.join()
    # Ray and Serve report each of their own steps; what users want to know is said here.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from ray import serve
    from ray.util import placement_group

    from twinkle.server.serve.deployments import APP_NAME, build_application
    from twinkle.server.serve.ranks import place_ranks

    # The ranks take longest, so they are started first of all; the engine finds them there.
    placement = placement_group(plan.bundles, strategy="PACK")
    ranks = place_ranks(placement, plan.model, plan.backend, plan.sampler)
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
    _say(f"Ready after {time.monotonic() - began:.0f} s: a training step and a sample have run.")


def _start_ray(plan: Plan) -> None:
    # Usage reports would reach for the network; Ray's dashboard is not ours to open on a user's machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's processes give way to all others of the machine, unless told that they are what it is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, plan.num_ranks),
            num_gpus=plan.num_ranks * plan.gpus_per_rank,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=True,
        )
    except Exception as error:
        raise ServerFault(
            f"Ray could not be started on this machine ({type(error).__name__}: {error}); its processes have half a "
            "minute, which may be too little while other programs keep the machine busy"
        ) from error


def _cause() -> str:
    """What Serve says of the deployments that failed."""
    from ray import serve

    from twinkle.server.serve.deployments import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return "Serve knows of no application"
    messages = [status.message for status in application.deployments.values() if status.message]
    return "\n".join(messages) or application.message


def _ready_lines(plan: Plan) -> str:
    server = plan.config.server
    shown = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    scheme = "https" if server.tls else "http"
    return "\n".join(
        [
            *_access_lines(plan.config),
            f"Twinkle listens on {server.host}:{server.port}; clients use {scheme}://{shown}:{server.port}",
        ]
    )


def _access_lines(config: ServerConfig) -> list[str]:
    """Who may come in, and what is wrong with that."""
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
        return False  # a name: whatever it stands for


def _close_engine() -> None:
    """Let the engine write what it is writing; the cluster ends all the same."""
    try:
        _engine().close.remote().result(timeout_s=30)
    except Exception as error:
        log.warning("the engine could not be closed in order: %s", error)


def _engine() -> Any:
    from ray import serve

    from twinkle.server.serve.deployments import APP_NAME

    return cast(Any, serve.get_deployment_handle("engine", APP_NAME))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
