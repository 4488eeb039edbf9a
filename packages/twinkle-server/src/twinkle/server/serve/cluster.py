"""The server's process: starts Ray and Serve, reports when it is ready, waits, and ends both.

`supervisor.py` starts it, and restarts it when it or Ray has ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Any, cast

import ray

from twinkle.protocol.errors import ServerFault, TwinkleError
from twinkle.server.config import ServerConfig
from twinkle.server.keys import with_auth_mode
from twinkle.server.plan import Plan, make_plan
from twinkle.server.serve.ray_cluster import check_room, join_ray, start_ray, watch_ray
from twinkle.server.serve.supervised import Supervised, say

log = logging.getLogger("twinkle.server")

_LOGGING = {"log_level": "ERROR", "enable_access_log": False}


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
        config = with_auth_mode(ServerConfig.model_validate_json(supervised.configuration))
        began = time.monotonic()
        # Takes seconds, as do Ray's own processes, which are started meanwhile.
        importing = threading.Thread(target=import_module, args=("twinkle.server.serve.deployments",))
        importing.start()
        if config.ray.address is None:
            plan = make_plan(config)
            _say_what_is_loaded(plan)
            start_ray(plan.bundles)
        else:
            plan = make_plan(config, join_ray(config.ray.address))
            _say_what_is_loaded(plan)
        take_signals()  # Ray's own handler of SIGTERM ends the process with a stack trace
        watch_ray(supervised, over)
        importing.join()
        running = _start(plan)
        say(f"Ready after {time.monotonic() - began:.0f} s: a training step and a sample have run.")
        ready.set()
        supervised.ready(plan.config.model_dump_json())
        stop.wait()
        say("Stopping.")
        running.close()
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
    if plan.joins_cluster and not plan.config.storage.is_on_database_server:
        say(
            "Only this machine of the cluster answers HTTP: others need storage.database_url, with keys and tokens in "
            "a database that they reach too."
        )


def _samplers(plan: Plan) -> str:
    if plan.samplers is None:
        return "no sampler"
    if not (count := plan.samplers.processes):
        return f"{plan.samplers.engine} sampler"
    gpus = f" on {plan.samplers.all_gpus} further GPUs" if plan.samplers.gpus else ""
    return f"{count} {plan.samplers.engine} sampler{'s' * (count > 1)} with processes of their own{gpus}"


@dataclass(frozen=True)
class _Running:
    """The server's part of Ray: its Serve application."""

    plan: Plan
    app: str

    def engine(self) -> Any:
        from ray import serve

        return cast(Any, serve.get_deployment_handle("engine", self.app))

    def close(self) -> None:
        """Let the engine finish its writes. In a cluster of others, leave nothing there."""
        try:
            self.engine().close.remote().result(timeout_s=30)
        except Exception as error:  # the cluster ends anyway
            log.warning("the engine could not be closed in order: %s", error)
        if self.plan.joins_cluster:
            from ray import serve

            serve.delete(self.app)


def _start(plan: Plan) -> _Running:
    """Start ranks, samplers, Serve and the engine; returns when they are ready."""
    # Ray and Serve log each of their own steps; what users want to know is printed here.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from ray import serve
    from ray.util import placement_group

    from twinkle.server.serve.deployments import app_name, build_application
    from twinkle.server.serve.ranks import place_ranks

    app = app_name(plan.config)
    serve.start(proxy_location="Disabled", logging_config=_LOGGING)
    if plan.joins_cluster and app in serve.status().applications:
        serve.delete(app)  # what a killed server left; two engines must never have one journal
    # The ranks take longest, so they are started before Serve's deployments, and then handed to the engine.
    placement = placement_group(plan.bundles, strategy="PACK")
    if plan.joins_cluster:
        check_room(placement, plan.bundles)
    ranks = place_ranks(plan, placement)
    try:
        serve.run(
            build_application(plan, placement, ranks), name=app, route_prefix=None, logging_config=_LOGGING
        )
    except RuntimeError as error:
        raise ServerFault(f"the server could not start: {_cause(app)}") from error
    running = _Running(plan, app)
    failure = running.engine().start_failure.remote().result(timeout_s=60)
    if failure is not None:
        raise ServerFault(f"the server could not start: {failure.message}")
    for note in running.engine().notes.remote().result(timeout_s=60):
        say(note)
    return running


def _cause(app: str) -> str:
    """Serve's messages about the deployments that failed."""
    from ray import serve

    application = serve.status().applications.get(app)
    if application is None:
        return "Serve knows of no application"
    messages = [status.message for status in application.deployments.values() if status.message]
    return "\n".join(messages) or application.message


if __name__ == "__main__":
    sys.exit(main())
