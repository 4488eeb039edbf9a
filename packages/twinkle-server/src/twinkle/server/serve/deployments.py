"""The Serve deployments: engines, and gateways that answer HTTP.

An engine that is alone answers HTTP itself; gateways beside it are for servers where one process can't keep up with
reading and writing HTTP. Where there are several engines, each is an application of its own, and only gateways answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import PlacementGroup

from twinkle.protocol import messages as m
from twinkle.protocol.errors import ServerFault, TwinkleError, Unavailable
from twinkle.server import logs
from twinkle.server.config import ServerConfig
from twinkle.server.plan import Plan
from twinkle.server.serve.handles import HandleService
from twinkle.server.serve.loopback import keep_grpc_local
from twinkle.server.serve.ranks import RankGroup
from twinkle.server.tokens import Download

# The launcher imports this module too; these are imported where they are used, while the ranks load the model.
if TYPE_CHECKING:
    from twinkle.server.gateway.port import ServicePort
    from twinkle.server.scheduling.futures import Fetched
    from twinkle.server.serve.http import HttpServer
    from twinkle.server.service.service import Service

log = logging.getLogger("twinkle.server")

T = TypeVar("T")

# An engine that could not start counts as healthy for this long, so that the launcher can ask it why. If it replaced
# another engine, it is replaced in turn afterwards.
_FAILURE_SHOWN_SECONDS = 30.0

# Each waiting long poll is an ongoing request of the engine: Serve's limit must never be reached.
_MAX_ONGOING = 1_000_000


class EngineDeployment:
    """The service of one base model: queues, scheduler, engine loop, store. It computes nothing itself."""

    async def __init__(
        self, plan: Plan, placement: PlacementGroup, ranks: list[Any], name: str | None, live: Path
    ) -> None:
        """Awaited by Serve.

        Args:
            placement: where the ranks are placed.
            ranks: the first ones, started alongside Serve.
            name: of the engine among several; None for one that is alone, and answers HTTP.
            live: directory of its live runs.
        """
        logs.send("engine" if name is None else name)
        keep_grpc_local()
        self._start_failure: TwinkleError | None = None
        self._http: HttpServer | None = None
        self._is_closing = False
        try:
            await self._start(plan, placement, ranks, name, live)
        except Exception as error:  # if raised here, it would reach the user as a traceback
            self._start_failure = _in_words(error)
            self._failed_at = time.monotonic()

    async def _start(
        self, plan: Plan, placement: PlacementGroup, first: list[Any], name: str | None, live: Path
    ) -> None:
        ranks = asyncio.create_task(RankGroup.start(plan, placement, first))
        await asyncio.sleep(0)  # lets them start loading
        from twinkle.server.app import build_service, build_signer

        group = await ranks
        self._notes = group.info.notes
        signer = build_signer(plan.config)
        self._service = build_service(plan.config, group, plan.model.path, signer, live, name)
        await self._service.start()
        if name is None:
            self._http = await listen(self._service, plan.config)

    async def start_failure(self) -> TwinkleError | None:
        """Why the service could not start; None if it did."""
        return self._start_failure

    async def notes(self) -> tuple[str, ...]:
        """Lines about how the model is computed, for whoever starts the server."""
        return self._notes

    async def ready(self) -> None | TwinkleError:
        return await _or_error(lambda: self._running().ready())

    async def metrics(self) -> str | TwinkleError:
        return await _or_error(lambda: self._running().metrics())

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise | TwinkleError:
        return await _or_error(lambda: self._running().submit(tenant, request, body, digest))

    async def fetch(
        self, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None = None
    ) -> list[Fetched] | TwinkleError:
        return await _or_error(lambda: self._running().fetch(tenant, request_ids, timeout, most_bytes))

    async def ask(self, tenant: str, query: m.Query[m.ReplyT]) -> m.ReplyT | TwinkleError:
        return await _or_error(lambda: self._running().ask(tenant, query))

    async def download_sizes(self, download: Download) -> dict[str, int] | TwinkleError:
        return await _or_error(lambda: self._running().download_sizes(download))

    async def download_part(
        self, download: Download, name: str, offset: int, size: int
    ) -> bytes | TwinkleError:
        return await _or_error(lambda: self._running().download_part(download, name, offset, size))

    async def runs(self) -> int | TwinkleError:
        """How many runs take requests; the failure of an engine that can't work."""
        return await _or_error(self._count_runs)

    async def _count_runs(self) -> int:
        service = self._running()
        try:
            service.check()
        except RuntimeError as error:
            raise ServerFault(str(error)) from error
        return sum(1 for _ in service.parts.live)

    async def adopt(self, directory: Path) -> int | TwinkleError:
        """Take over the runs of an engine that has ended; returns how many."""
        return await _or_error(lambda: self._running().adopt(directory))

    def _running(self) -> Service:
        if self._start_failure is not None:
            # Not the failure itself, which would tell a client that its request is wrong.
            raise Unavailable(
                f"the engine could not be started, and is started again: {self._start_failure.message}", 5.0
            )
        if self._is_closing:
            raise Unavailable("the engine is being stopped, and accepts nothing more; try again", 2.0)
        return self._service

    async def close(self) -> None:
        service = self._running()
        self._is_closing = True
        if self._http is not None:
            await self._http.close()
        await service.close()

    async def check_health(self) -> None:
        """Raises if Serve should start another engine. The service restarts ranks by itself, and fails here only if
        that has failed.
        """
        if self._start_failure is not None and time.monotonic() < self._failed_at + _FAILURE_SHOWN_SECONDS:
            return
        if self._is_closing:
            return
        self._running().check()
        if self._http is not None:
            _check_listens(self._http)


class GatewayDeployment:
    """A process that reads and writes HTTP alongside the engine, on the same port."""

    async def __init__(  # Serve awaits it
        self,
        engine: DeploymentHandle[Any],
        config: ServerConfig,
        _beside: DeploymentHandle[Any] | None,  # only so that it is part of the application
    ) -> None:
        logs.send("gateway")
        keep_grpc_local()
        # The engine answers this when it is ready; no client should be answered before.
        await cast(Any, engine).start_failure.remote()
        self._http = await listen(HandleService(engine), config)

    async def check_health(self) -> None:
        _check_listens(self._http)


class DoorDeployment:
    """A process that reads and writes HTTP in front of several engines."""

    async def __init__(self, config: ServerConfig, server: str) -> None:
        """Awaited by Serve.

        Args:
            server: whose engines they are.
        """
        logs.send("gateway")
        keep_grpc_local()
        from twinkle.server.serve.fleet_view import FleetView
        from twinkle.server.serve.router import Router
        from twinkle.server.store.database import Database

        def connect(engine: str) -> ServicePort:
            return HandleService(cast(Any, serve).get_deployment_handle("engine", engine_app(config, engine)))

        database = Database(config.storage.url)
        self._http = await listen(Router(FleetView(database, server), database, connect), config)

    async def close(self) -> None:
        await self._http.close()

    async def check_health(self) -> None:
        _check_listens(self._http)


async def listen(service: ServicePort, config: ServerConfig) -> HttpServer:
    """Serve the HTTP application in front of `service` as configured."""
    from twinkle.server.app import build_keys, build_signer
    from twinkle.server.gateway.app import create_app
    from twinkle.server.serve.http import HttpServer

    server = config.server
    app = create_app(
        service,
        config.limits,
        build_signer(config),
        server.public_url,
        build_keys(config),
        config.log.access,
    )
    return await HttpServer.start(app, server.host, server.port, server.tls, config.limits.max_connections)


def _check_listens(http: HttpServer) -> None:
    if not http.is_up:
        raise RuntimeError("the HTTP server has ended")


def _in_words(error: Exception) -> TwinkleError:
    """One sentence about why an engine can't start. Unexpected errors are logged with their traceback."""
    if isinstance(error, TwinkleError):
        return error
    log.error("the engine could not start", exc_info=error)
    told = next(iter(str(error).strip().splitlines()), "it says no more")
    return ServerFault(
        f"{type(error).__name__}: {told[:400]} (this comes from the server or a library that it uses, and was not "
        "expected; the server's log has where)"
    )


async def _or_error(answer: Callable[[], Awaitable[T]]) -> T | TwinkleError:
    """Errors meant for users are returned: Serve would log them with a traceback, as the server's faults."""
    try:
        return await answer()
    except TwinkleError as error:
        return error


def app_name(config: ServerConfig) -> str:
    """Of the server's Serve application: in a cluster that it joins there may be others'."""
    return "twinkle" if config.ray.address is None else f"twinkle-{config.server_name}"


def engine_app(config: ServerConfig, engine: str) -> str:
    """Of one of several engines' Serve application."""
    return f"{app_name(config)}-{engine}"


def build_application(plan: Plan, placement: PlacementGroup, ranks: list[Any]) -> serve.Application:
    """The deployments of an engine that is alone, wired; see `EngineDeployment` for `placement` and `ranks`."""
    from twinkle.server.app import live_directory

    engine = build_engine(plan, placement, ranks, None, live_directory(plan.config))
    application, deployment = engine, cast(Any, serve.deployment)
    for name, replicas, where in _gateways(plan.config, plan.config.server.num_replicas - 1):
        application = deployment(
            GatewayDeployment, **_gateway_options(plan.config, name, replicas, where)
        ).bind(engine, plan.config, None if application is engine else application)
    return application


def build_door(config: ServerConfig, server: str) -> serve.Application:
    """The gateways in front of several engines; see `DoorDeployment`."""
    deployment = cast(Any, serve.deployment)
    [application] = [
        deployment(DoorDeployment, **_gateway_options(config, name, replicas, where)).bind(config, server)
        for name, replicas, where in _gateways(config, config.server.num_replicas)
    ]
    return application


def build_engine(
    plan: Plan, placement: PlacementGroup, ranks: list[Any], name: str | None, live: Path
) -> serve.Application:
    """See `EngineDeployment`."""
    # Serve's annotations don't allow async constructors.
    return cast(Any, serve.deployment)(
        EngineDeployment,
        name="engine",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=5,
        # What fails at start-up (a model that can't be loaded) would fail again.
        max_constructor_retry_count=1,
        health_check_period_s=2,
        health_check_timeout_s=30,
        # Where the server was started: its journal is there.
        ray_actor_options={"num_cpus": 0, **_here(plan.config)},
    ).bind(plan, placement, ranks, name, live)


def _gateway_options(config: ServerConfig, name: str, replicas: int, where: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "num_replicas": replicas,
        "max_replicas_per_node": config.server.num_replicas,
        "max_ongoing_requests": _MAX_ONGOING,
        "health_check_period_s": 2,
        "ray_actor_options": {"num_cpus": 0, **where},
    }


def _gateways(config: ServerConfig, here: int) -> list[tuple[str, int, dict[str, Any]]]:
    """Name, number and place of the gateways on this machine, and on all others.

    Args:
        here: how many this machine is to have.
    """
    if config.ray.address is None:
        found: list[tuple[str, int, dict[str, Any]]] = [("gateway", here, {})]
    else:
        node = ray.get_runtime_context().get_node_id()
        alive = sum(one["Alive"] for one in cast(list[dict[str, Any]], cast(Any, ray).nodes()))
        # Elsewhere keys and the secret that signs tokens are only to be had from a database server.
        others = alive - 1 if config.storage.is_on_database_server else 0
        found = [
            ("gateway", here, _on(node)),
            ("gateway-elsewhere", config.server.num_replicas * others, _on(f"!{node}")),
        ]
    return [gateways for gateways in found if gateways[1]]


def _here(config: ServerConfig) -> dict[str, Any]:
    """Options that place an actor on this machine."""
    return {} if config.ray.address is None else _on(ray.get_runtime_context().get_node_id())


def _on(node: str) -> dict[str, Any]:
    return {"label_selector": {"ray.io/node-id": node}}
