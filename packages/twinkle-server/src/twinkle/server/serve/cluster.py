"""The server's process: starts Ray and Serve, reports when it is ready, waits, and ends both.

`supervisor.py` starts it, and restarts it when it or Ray has ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING

import ray

from twinkle.protocol.errors import TwinkleError
from twinkle.server._version import __version__
from twinkle.server.config import ServerConfig
from twinkle.server.keys import with_auth_mode
from twinkle.server.logs import LEVEL_VARIABLE, shown
from twinkle.server.plan import Plan, make_plan, num_gpus
from twinkle.server.serve.ray_cluster import join_ray, start_ray, watch_ray
from twinkle.server.serve.ray_place import ray_directory
from twinkle.server.serve.supervised import Supervised, say
from twinkle.server.serve.worker_output import show_workers_output
from twinkle.server.store.private import private_directory

if TYPE_CHECKING:
    from twinkle.server.serve.running import Running

# What a server with several engines gives Ray, so that there is room for more.
_CPUS_TO_ADD = 1024.0

_STOPPED_EARLY = "Stopped before it was ready."


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

    def on_stop() -> None:
        if ready.is_set():
            os.kill(os.getpid(), signal.SIGINT)  # interrupts whatever the main thread waits for
            return
        # Ray's start, and threads that start engines, take no notice of an interrupt. Nothing has been accepted yet,
        # and the supervisor ends all that this process has started.
        say(_STOPPED_EARLY)
        os._exit(0)

    def take_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)

    take_signals()
    logged = ExitStack()
    try:
        supervised.watch(on_stop)
        config = with_auth_mode(ServerConfig.model_validate_json(supervised.configuration))
        logged.enter_context(_logged(config))
        began = time.monotonic()
        # Takes seconds, as do Ray's own processes, which are started meanwhile.
        importing = threading.Thread(target=import_module, args=("twinkle.server.serve.running",))
        importing.start()
        start = _prepare_several(config) if config.has_door else _prepare_one(config)
        take_signals()  # Ray's own handler of SIGTERM ends the process with a stack trace
        show_workers_output()
        watch_ray(supervised, over)
        importing.join()
        running = start()
        say(f"Ready after {time.monotonic() - began:.0f} s: a training step and a sample have run.")
        ready.set()
        supervised.ready(config.as_json())
        running.run(stop)
        say("Stopping.")
        running.close()
    except KeyboardInterrupt:
        say(_STOPPED_EARLY)
    except TwinkleError as error:
        supervised.failed(error)
        return 1
    finally:
        stop.set()
        over.set()
        ray.shutdown()
        logged.close()
    return 0


@contextmanager
def _logged(config: ServerConfig) -> Generator[None]:
    """While entered, this process's log is shown, and that of those that Ray starts."""
    os.environ[LEVEL_VARIABLE] = config.log.level.upper()
    with shown(config.log):
        _say_what_starts(config)
        yield


def _say_what_starts(config: ServerConfig) -> None:
    storage, limits = config.storage, config.limits
    database = "a database server" if storage.is_on_database_server else "SQLite"
    say(
        f"Twinkle {__version__}, process {os.getpid()}; storage in {storage.shared_url or storage.root}, {database}."
    )
    say(
        f"Limits of a tenant: {_limit(limits.max_runs_per_tenant)} runs, "
        f"{_limit(limits.max_checkpoints_per_tenant)} checkpoints, "
        f"{_limit(limits.max_queued_tokens_per_tenant)} queued tokens, and others (limits)."
    )
    if config.ray.address is None:
        say(f"Ray's own logs are in {ray_directory()}/session_latest/logs until the server ends.")


def _limit(number: int | None) -> str:
    return "any number of" if number is None else f"{number:,}"


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
    most = plan.samplers.max_processes
    number = str(count) if most == count else f"{count} to {most}"
    return f"{number} {plan.samplers.engine} sampler{'s' * (most > 1)} with processes of their own{gpus}"


def _prepare_one(config: ServerConfig) -> Callable[[], Running]:
    """Plan and start Ray; returns what starts the engine."""
    if config.ray.address is None:
        plan = make_plan(config)
        _say_what_is_loaded(plan)
        start_ray(plan.most_bundles)
    else:
        plan = make_plan(config, join_ray(config.ray.address))
        _say_what_is_loaded(plan)

    def start() -> Running:
        from twinkle.server.serve.running import OneEngine  # imports much: see `main`

        return OneEngine.start(plan)

    return start


def _prepare_several(config: ServerConfig) -> Callable[[], Running]:
    """As `_prepare_one`, for several engines."""
    gpus = None if config.ray.address is None else join_ray(config.ray.address)
    from twinkle.server.serve.fleet_plan import plan_all, server_id
    from twinkle.server.store.database import Database

    private_directory(config.storage.directory)
    server, database = server_id(config), Database(config.storage.url)
    try:
        plans = plan_all(config, database, server, gpus)
    finally:
        database.close()
    for plan in plans.values():
        _say_what_is_loaded(plan)
    if config.ray.address is None:
        # Models may be added while it runs: to Ray a CPU is only a number.
        everything = {"CPU": _CPUS_TO_ADD, "GPU": float(num_gpus(config))}
        start_ray(
            [*({"CPU": bundle["CPU"]} for plan in plans.values() for bundle in plan.most_bundles), everything]
        )

    def start() -> Running:
        from twinkle.server.serve.running import SeveralEngines

        return SeveralEngines.start(config, plans, server, gpus)

    return start


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads that still wait for engines to start wait for ever: Ray has ended
