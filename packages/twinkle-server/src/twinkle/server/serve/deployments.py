"""The two Serve deployments: gateways (as many as wanted, stateless) in front of one engine per base model."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util import get_current_placement_group

from twinkle.protocol import messages as m
from twinkle.protocol.errors import TwinkleError
from twinkle.server.app import Plan, build_service, build_signer, build_snapshot_files
from twinkle.server.gateway.app import create_app
from twinkle.server.serve.ranks import RankGroup
from twinkle.server.service.service import Service
from twinkle.server.tokens import Download, Signer

T = TypeVar("T")

APP_NAME = "twinkle"

# An engine that could not start counts as healthy for so long, for the one who starts the server to ask why; an engine
# that took another's place is then replaced in turn.
_FAILURE_SHOWN_SECONDS = 30.0

# Long polls wait in the engine: each holds one of these, so they must never be what runs out.
_MAX_ONGOING = 1_000_000


class EngineDeployment:
    """The service of one base model: queues, scheduler, engine loop, store. It computes nothing itself."""

    async def __init__(self, plan: Plan) -> None:  # Serve awaits it
        self._start_failure: TwinkleError | None = None
        try:
            await self._start(plan)
        except (
            TwinkleError
        ) as error:  # raised here, it would reach the one who starts the server as a traceback
            self._start_failure = error
            self._failed_at = time.monotonic()

    async def _start(self, plan: Plan) -> None:
        group = get_current_placement_group()
        assert group is not None, "the deployment's placement group holds a bundle for each rank"
        ranks = await RankGroup.start(group, plan.model, plan.backend, plan.sampler, plan.gpus_per_rank)
        self._service = build_service(
            plan.config,
            ranks,
            plan.model.path,
            build_signer(plan.config),
            build_snapshot_files(plan.config),
        )
        await self._service.start()

    async def start_failure(self) -> TwinkleError | None:
        """Why the service could not start, if it couldn't."""
        return self._start_failure

    async def submit(self, tenant: str, request: m.Operation) -> m.Promise | TwinkleError:
        return await _or_error(lambda: self._running().submit(tenant, request))

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.Pending | TwinkleError:
        return await _or_error(lambda: self._running().retrieve(tenant, request_id, timeout))

    async def ask(self, tenant: str, query: m.Query) -> m.Reply | TwinkleError:
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
        await self._running().close()

    async def check_health(self) -> None:
        """Fails when Serve is to start another engine. A rank that ended is none of its business: the service starts it
        anew, and only if that fails it says so here.
        """
        if self._start_failure is not None and time.monotonic() < self._failed_at + _FAILURE_SHOWN_SECONDS:
            return
        self._running().check()


class HandleService:
    """A `ServicePort` over a deployment handle."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = cast(Any, engine)

    async def submit(self, tenant: str, request: m.Operation) -> m.Promise:
        return await self._call(self._engine.submit.remote(tenant, request))

    async def retrieve(
        self, tenant: str, request_id: str, timeout: float
    ) -> m.Result | m.Failure | m.Pending:
        return await self._call(self._engine.retrieve.remote(tenant, request_id, timeout))

    async def ask(self, tenant: str, query: m.Query) -> m.Reply:
        return await self._call(self._engine.ask.remote(tenant, query))

    async def download_sizes(self, download: Download) -> dict[str, int]:
        return await self._call(self._engine.download_sizes.remote(download))

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes:
        return await self._call(self._engine.download_part.remote(download, name, offset, size))

    @staticmethod
    async def _call(response: Any) -> Any:
        value = await response
        if isinstance(value, TwinkleError):
            raise value
        return value


async def _or_error(answer: Callable[[], Awaitable[T]]) -> T | TwinkleError:
    """Errors meant for people travel as values: Serve logs what is raised, traceback and all, as a fault of ours."""
    try:
        return await answer()
    except TwinkleError as error:
        return error


def build_gateway(max_request_bytes: int, signer: Signer, public_url: str | None) -> FastAPI:
    """The ASGI application of a gateway replica, made in its process."""
    engine = cast(Any, serve.get_deployment_handle("engine", APP_NAME))
    return create_app(HandleService(engine), max_request_bytes, signer, public_url)


def build_application(plan: Plan) -> serve.Application:
    """Both deployments, wired."""
    # Serve's own annotations know neither async constructors nor deployments made of ingress classes.
    deployment = cast(Any, serve.deployment)
    max_request_bytes = plan.config.limits.max_request_bytes
    signer = build_signer(plan.config)
    public_url = plan.config.server.public_url

    def build() -> FastAPI:  # Serve takes a builder for what it is only if it is a plain function
        return build_gateway(max_request_bytes, signer, public_url)

    gateway_class = cast(Any, serve.ingress)(build)()
    engine = deployment(
        EngineDeployment,
        name="engine",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=5,
        # What fails at start-up (a model that can't be loaded) fails again; after that Serve retries by itself.
        max_constructor_retry_count=1,
        health_check_period_s=2,
        health_check_timeout_s=30,
        ray_actor_options={"num_cpus": plan.bundles[0]["CPU"]},
        placement_group_bundles=plan.bundles,
        placement_group_strategy="PACK",
    ).bind(plan)
    gateway = deployment(
        gateway_class,
        name="gateway",
        num_replicas=plan.config.server.num_replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(engine)
