"""A sampler beyond those that are always there, on a placement group that is made for it and goes with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import ray
from ray.util import placement_group, remove_placement_group

from twinkle.server.plan import Plan
from twinkle.server.serve.rpc import ConnectionLost
from twinkle.server.serve.sampler_handle import SamplerHandle

log = logging.getLogger("twinkle.server")

# If there is no room within this, the log says so.
_ROOM_SECONDS = 5.0
# What the engine gets to close what it holds.
_CLOSE_SECONDS = 30.0


@dataclass(eq=False)
class SamplerOnDemand:
    """From when it is wanted until nothing is left of it.

    Attributes:
        number: for the log.
        handle: None until it is up, and if it can't be started.
        is_leaving: it gets no more samples.
        life: the pool's task that starts and ends it.
    """

    number: int
    handle: SamplerHandle | None = None
    is_leaving: bool = False
    life: asyncio.Task[None] | None = None
    _has_drawn: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def drawing(self) -> int:
        """Sequences; fewer than none while it isn't up."""
        return -1 if self.handle is None else self.handle.drawing

    @property
    def is_drawing_its_last(self) -> bool:
        return self.is_leaving and self.handle is not None and not self._has_drawn.is_set()

    def end_if_idle(self) -> None:
        if self.is_leaving and self.drawing == 0:
            self._has_drawn.set()

    def cancel(self) -> asyncio.Task[None]:
        """End it at once; returns its task, at whose end nothing is left."""
        assert self.life is not None, "it lives from the start"
        self.life.cancel()
        return self.life

    @contextlib.asynccontextmanager
    async def started(self, plan: Plan) -> AsyncGenerator[SamplerHandle]:
        """Wait for room, and start the process; it has ended afterwards.

        Raises:
            Exception: as `SamplerHandle.start`.
        """
        # If the engine's process is killed, Ray removes it: it is of the actor that has made it.
        placement = placement_group([plan.sampler_bundle], strategy="PACK")
        try:
            if not await asyncio.to_thread(placement.wait, _ROOM_SECONDS):
                log.warning(
                    "The cluster has no room for sampler %d; it starts when there is, if it is still wanted.",
                    self.number,
                )
            self.handle = await SamplerHandle.start(plan, self.number, placement, 0)
            try:
                yield self.handle
                with contextlib.suppress(Exception):  # what it can't close ends with it
                    async with asyncio.timeout(_CLOSE_SECONDS):
                        await self.handle.call("close")
            finally:
                self.handle.connection.close()
                ray.kill(self.handle.actor)
        finally:
            remove_placement_group(placement)

    async def lost_or_done(self) -> ConnectionLost | None:
        """Wait until it is lost (returns why), or is leaving and has drawn what it had."""
        assert self.handle is not None, "it has been started"
        lost = asyncio.create_task(self.handle.connection.lost())
        done = asyncio.create_task(self._has_drawn.wait())
        try:
            await asyncio.wait({lost, done}, return_when=asyncio.FIRST_COMPLETED)
            return lost.result() if lost.done() else None
        finally:
            lost.cancel()
            done.cancel()
