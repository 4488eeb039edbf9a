"""The server's part of Ray, with one engine or several: its start, its work until it is to stop, and its end."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, Protocol

from ray.util import placement_group

from twinkle.protocol.errors import ServerFault
from twinkle.server.config import ServerConfig
from twinkle.server.plan import Plan
from twinkle.server.serve.deployments import app_name, build_application, build_door
from twinkle.server.serve.fleet import Fleet
from twinkle.server.serve.ranks import place_ranks
from twinkle.server.serve.ray_cluster import check_room
from twinkle.server.serve.serve_apps import cause_of, deploy, end_app, handle_of, start_serve
from twinkle.server.serve.supervised import say
from twinkle.server.store.database import Database

log = logging.getLogger("twinkle.server")


class Running(Protocol):
    def run(self, stop: threading.Event) -> None:
        """Do what is to be done beside the engines and gateways, until `stop` is set."""
        ...

    def close(self) -> None:
        """Let engines finish their writes. In a cluster of others, leave nothing there."""
        ...


@dataclass(frozen=True)
class OneEngine:
    """An engine that answers HTTP itself, perhaps with gateways beside it."""

    plan: Plan
    app: str

    @classmethod
    def start(cls, plan: Plan) -> OneEngine:
        """Start ranks, samplers, Serve and the engine; returns when they are ready.

        Raises:
            ServerFault, InvalidRequest: why they can't.
        """
        app = app_name(plan.config)
        start_serve([app] if plan.joins_cluster else [])
        # The ranks take longest, so they are started before Serve's deployments, and then handed to the engine.
        placement = placement_group(plan.bundles, strategy="PACK")
        if plan.joins_cluster:
            check_room(placement, plan.bundles)
        ranks = place_ranks(plan, placement)
        try:
            deploy(lambda: build_application(plan, placement, ranks), app)
        except RuntimeError as error:
            raise ServerFault(f"the server could not start: {cause_of(app)}") from error
        running = cls(plan, app)
        failure = running._engine().start_failure.remote().result(timeout_s=60)
        if failure is not None:
            raise ServerFault(f"the server could not start: {failure.message}")
        for note in running._engine().notes.remote().result(timeout_s=60):
            say(note)
        return running

    def _engine(self) -> Any:
        return handle_of("engine", self.app)

    def run(self, stop: threading.Event) -> None:
        stop.wait()

    def close(self) -> None:
        try:
            self._engine().close.remote().result(timeout_s=30)
        except Exception as error:  # the cluster ends anyway
            log.warning("the engine could not be closed in order: %s", error)
        if self.plan.joins_cluster:
            end_app(self.app)


@dataclass(frozen=True)
class SeveralEngines:
    """Engines that come and go, and gateways in front of them."""

    config: ServerConfig
    fleet: Fleet
    app: str

    @classmethod
    def start(
        cls, config: ServerConfig, plans: dict[str, Plan], server: str, gpus_of_cluster: int | None
    ) -> SeveralEngines:
        """Start all engines, and then the gateways; returns when all are ready.

        Args:
            plans: by the engines' names.
            server: whose engines they are.
            gpus_of_cluster: as in `make_plan`.

        Raises:
            ServerFault: why they can't.
        """
        app = app_name(config)
        start_serve([app] if config.ray.address else [], [f"{app}-"])
        fleet = Fleet(config, Database(config.storage.url), server, gpus_of_cluster)
        fleet.start(plans)
        try:
            deploy(lambda: build_door(config, server), app)
        except RuntimeError as error:
            raise ServerFault(f"the server could not start: {cause_of(app)}") from error
        return cls(config, fleet, app)

    def run(self, stop: threading.Event) -> None:
        self.fleet.run(stop)

    def close(self) -> None:
        # First nothing more is let in.
        end_app(self.app)
        self.fleet.close()
