"""One of several engines in Ray: its start, what it says of itself, and its end. Blocking."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from twinkle.protocol.errors import ServerFault, TwinkleError
from twinkle.server.config import ServerConfig
from twinkle.server.plan import Plan
from twinkle.server.serve.deployments import build_engine, engine_app
from twinkle.server.serve.ranks import place_ranks
from twinkle.server.serve.ray_cluster import check_room
from twinkle.server.serve.serve_apps import cause_of, deploy, end_app, handle_of
from twinkle.server.serve.supervised import say

log = logging.getLogger("twinkle.server")

# An engine that doesn't say within this how many runs it has is not counted as working.
_LOOK_SECONDS = 10.0
_CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class EngineProcess:
    """An engine that works, or did."""

    app: str
    placement: PlacementGroup

    @classmethod
    def start(cls, config: ServerConfig, plan: Plan, name: str, live: Path) -> EngineProcess:
        """Returns when a training step and a sample have succeeded.

        Args:
            config: of the whole server.
            plan: of this engine.
            live: directory of its live runs.

        Raises:
            TwinkleError: why it could not; nothing is left of it then.
        """
        placement = placement_group(plan.bundles, strategy="PACK")
        engine = cls(engine_app(config, name), placement)
        try:
            check_room(placement, plan.bundles, "ray.address" if plan.joins_cluster else "ray.num_gpus")
            ranks = place_ranks(plan, placement)
            deploy(lambda: build_engine(plan, placement, ranks, name, live), engine.app)
            failure = engine._handle().start_failure.remote().result(timeout_s=60)
            if failure is not None:
                raise failure
            for note in engine._handle().notes.remote().result(timeout_s=60):
                say(f"{name}: {note}")
        except TwinkleError:
            engine.end()
            raise
        except RuntimeError as error:
            said = cause_of(engine.app)
            engine.end()
            raise ServerFault(said) from error
        return engine

    def _handle(self) -> Any:
        return handle_of("engine", self.app)

    def runs(self) -> int:
        """How many runs take requests.

        Raises:
            Exception: if it doesn't work, whatever the reason.
        """
        return _value(self._handle().runs.remote().result(timeout_s=_LOOK_SECONDS))

    def adopt(self, directory: Path) -> int:
        """Have it take over the runs of an engine that has ended; returns how many.

        Raises:
            Exception: if it can't.
        """
        return _value(self._handle().adopt.remote(directory).result(timeout_s=None))

    def close(self) -> None:
        """Let it finish its writes, and end it."""
        try:
            self._handle().close.remote().result(timeout_s=_CLOSE_SECONDS)
        except Exception as error:
            log.warning(
                "an engine could not be closed in an orderly way; its journal has what is left: %s", error
            )
        self.end()

    def end(self) -> None:
        """End it at once, with its ranks and samplers."""
        with contextlib.suppress(Exception):
            end_app(self.app)
        with contextlib.suppress(Exception):
            remove_placement_group(self.placement)


def _value(answer: int | TwinkleError) -> int:
    if isinstance(answer, TwinkleError):
        raise answer
    return answer
