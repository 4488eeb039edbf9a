"""Serve's applications: how they log, what an earlier server left of them, and why one failed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from ray import serve

SERVE_LOGGING = {"log_level": "ERROR", "enable_access_log": False}

# Serve's own functions are for one thread.
_SERVE = threading.Lock()
_POLL_SECONDS = 0.2


def deploy(build: Callable[[], serve.Application], name: str) -> None:
    """Deploy an application, and wait until all of its actors have been made. On any thread.

    Args:
        build: makes it.

    Raises:
        RuntimeError: if that fails; `cause_of` knows why.
    """
    with _SERVE:
        target = serve.RunTarget(build(), name=name, route_prefix=None, logging_config=SERVE_LOGGING)
        serve.run_many([target], wait_for_applications_running=False)
    while True:
        with _SERVE:
            found = serve.status().applications.get(name)
        if found is not None and found.status == "RUNNING":
            return
        if found is not None and found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RuntimeError(found.message)
        time.sleep(_POLL_SECONDS)


def end_app(name: str) -> None:
    """End an application and its actors. On any thread."""
    with _SERVE:
        serve.delete(name)


def handle_of(deployment: str, app: str) -> Any:
    """On any thread."""
    with _SERVE:
        return cast(Any, serve.get_deployment_handle(deployment, app))


def start_serve(leftovers: Sequence[str], prefixes: Sequence[str] = ()) -> None:
    """Start Serve, and end what a killed server left in the cluster: two engines must never have one journal.

    Args:
        leftovers: names of its applications.
        prefixes: of further names.
    """
    # Ray and Serve log each of their own steps; what users want to know is printed by the server.
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config=SERVE_LOGGING)
    if leftovers:
        for app in serve.status().applications:
            if app in leftovers or app.startswith(tuple(prefixes)):
                serve.delete(app)


def cause_of(app: str) -> str:
    """Serve's messages about the deployments that failed."""
    with _SERVE:
        application = serve.status().applications.get(app)
    if application is None:
        return "Serve knows of no application"
    messages = [status.message for status in application.deployments.values() if status.message]
    return "\n".join(messages) or application.message
