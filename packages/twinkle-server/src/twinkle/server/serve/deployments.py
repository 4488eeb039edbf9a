"""The Serve deployments: one engine per base model, which answers HTTP itself, and optional gateways.

Gateways are for servers where one process can't keep up with reading and writing HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.placement_group import PlacementGroup

from twinkle.protocol import messages as m
from twinkle.protocol.errors import ServerFault, TwinkleError, Unavailable
from twinkle.server.config import ServerConfig
from twinkle.server.plan import Plan
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

# A running engine says at once whether it is ready.
_READY_SECONDS = 2.0

# Each waiting long poll is an ongoing request of the engine: Serve's limit must never be reached.
_MAX_ONGOING = 1_000_000


class EngineDeployment:
    """The service of one base model: queues, scheduler, engine loop, store. It computes nothing itself."""

    async def __init__(self, plan: Plan, placement: PlacementGroup, ranks: list[Any]) -> None:
        """Awaited by Serve.

        Args:
            placement: where the ranks are placed.
            ranks: the first ones, started alongside Serve.
        """
        keep_grpc_local()
        self._start_failure: TwinkleError | None = None
        try:
            await self._start(plan, placement, ranks)
        except Exception as error:  # if raised here, it would reach the user as a traceback
            self._start_failure = _in_words(error)
            self._failed_at = time.monotonic()

    async def _start(self, plan: Plan, placement: PlacementGroup, first: list[Any]) -> None:
        ranks = asyncio.create_task(RankGroup.start(plan, placement, first))
        await asyncio.sleep(0)  # lets them start loading
        from twinkle.server.app import build_service, build_signer, live_directory

        group = await ranks
        self._notes = group.info.notes
        self._service = build_service(
            plan.config,
            group,
            plan.model.path,
            build_signer(plan.config),
            live_directory(plan.config),
        )
        await self._service.start()
        self._http = await listen(self._service, plan.config)

    async def start_failure(self) -> TwinkleError | None:
        """Why the service could not start; None if it did."""
        return self._start_failure

    async def notes(self) -> tuple[str, ...]:
        """Lines about how the model is computed, for whoever starts the server."""
        return self._notes

    async def ready(self) -> None | TwinkleError:
        return await _or_error(lambda: self._running().ready())

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

    def _running(self) -> Service:
        if self._start_failure is not None:
            raise self._start_failure
        return self._service

    async def close(self) -> None:
        service = self._running()
        await self._http.close()
        await service.close()

    async def check_health(self) -> None:
        """Raises if Serve should start another engine. The service restarts ranks by itself, and fails here only if
        that has failed.
        """
        if self._start_failure is not None and time.monotonic() < self._failed_at + _FAILURE_SHOWN_SECONDS:
            return
        self._running().check()
        _check_listens(self._http)


class GatewayDeployment:
    """A process that reads and writes HTTP alongside the engine, on the same port."""

    async def __init__(  # Serve awaits it
        self,
        engine: DeploymentHandle[Any],
        config: ServerConfig,
        _beside: DeploymentHandle[Any] | None,  # only so that it is part of the application
    ) -> None:
        keep_grpc_local()
        # The engine answers this when it is ready; no client should be answered before.
        await cast(Any, engine).start_failure.remote()
        self._http = await listen(HandleService(engine), config)

    async def check_health(self) -> None:
        _check_listens(self._http)


async def listen(service: ServicePort, config: ServerConfig) -> HttpServer:
    """Serve the HTTP application in front of `service` as configured."""
    from twinkle.server.app import build_keys, build_signer
    from twinkle.server.gateway.app import create_app
    from twinkle.server.serve.http import HttpServer

    server = config.server
    app = create_app(service, config.limits, build_signer(config), server.public_url, build_keys(config))
    return await HttpServer.start(app, server.host, server.port, server.tls, config.limits.max_connections)


def _check_listens(http: HttpServer) -> None:
    if not http.is_up:
        raise RuntimeError("the HTTP server has ended")


class HandleService:
    """A `ServicePort` over a deployment handle."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = cast(Any, engine)

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._call(self._engine.ready.remote())
        except TimeoutError as error:
            raise Unavailable("the engine doesn't answer", 2.0) from error

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise:
        return await self._call(self._engine.submit.remote(tenant, request, body, digest))

    async def fetch(
        self, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None = None
    ) -> list[Fetched]:
        return await self._wait(self._engine.fetch.remote(tenant, request_ids, timeout, most_bytes))

    async def ask(self, tenant: str, query: m.Query[m.ReplyT]) -> m.ReplyT:
        answer = self._engine.ask.remote(tenant, query)
        is_long = isinstance(query, m.RetrieveFuturesRequest)
        return await (self._wait(answer) if is_long else self._call(answer))

    async def download_sizes(self, download: Download) -> dict[str, int]:
        return await self._call(self._engine.download_sizes.remote(download))

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes:
        return await self._call(self._engine.download_part.remote(download, name, offset, size))

    async def _wait(self, response: Any) -> Any:
        """`_call` for long polls: if the client hangs up, cancels the call in the engine too, where it would count as
        waiting. By itself Serve doesn't stop a call whose caller was cancelled.
        """
        try:
            return await self._call(response)
        except asyncio.CancelledError:
            response.cancel()
            raise

    @staticmethod
    async def _call(response: Any) -> Any:
        value = await response
        if isinstance(value, TwinkleError):
            raise value
        return value


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


def build_application(plan: Plan, placement: PlacementGroup, ranks: list[Any]) -> serve.Application:
    """The deployments, wired; see `EngineDeployment` for `placement` and `ranks`."""
    # Serve's annotations don't allow async constructors.
    deployment = cast(Any, serve.deployment)
    here, elsewhere, others = _machines(plan)
    engine = deployment(
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
        ray_actor_options={"num_cpus": 0, **here},
    ).bind(plan, placement, ranks)
    per_machine = plan.config.server.num_replicas
    application = engine
    for name, replicas, where in (
        ("gateway", per_machine - 1, here),
        ("gateway-elsewhere", per_machine * others, elsewhere),
    ):
        if replicas:
            application = deployment(
                GatewayDeployment,
                name=name,
                num_replicas=replicas,
                max_replicas_per_node=per_machine,
                health_check_period_s=2,
                ray_actor_options={"num_cpus": 0, **where},
            ).bind(engine, plan.config, None if application is engine else application)
    return application


def _machines(plan: Plan) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Options that place an actor on this machine, or on any other; and how many others are to have gateways."""
    if not plan.joins_cluster:
        return {}, {}, 0
    node = ray.get_runtime_context().get_node_id()
    alive = sum(one["Alive"] for one in cast(list[dict[str, Any]], cast(Any, ray).nodes()))
    here, elsewhere = ({"label_selector": {"ray.io/node-id": label}} for label in (node, f"!{node}"))
    # Elsewhere keys and the secret that signs tokens are only to be had from a database server.
    return here, elsewhere, alive - 1 if plan.config.storage.is_on_database_server else 0
