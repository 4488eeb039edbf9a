"""Samplers with processes of their own: which one draws a sample, replacing lost ones, as many as the load asks for.

A published adapter is put into Ray's object store once, where it never changes. A sampler fetches it from there, over
shared memory on one machine, when it is first to sample with it. So a new sampler needs nobody's help to begin, and a
lost one costs a retry: `generate` raises `WorkerLost`, and `SampleRunner` asks again.

They are plain actors and not replicas of a deployment, which Serve would autoscale: a request goes to the one that has
its adapter, which Serve's routing can't see.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Sequence
from math import ceil
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup

from twinkle.protocol.errors import NotFound, ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.worker import SamplerPlace, WorkerLost
from twinkle.server.plan import Plan
from twinkle.server.sampler_plan import SamplerPlan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.autoscaling import Policy, Scale, next_scale
from twinkle.server.serve.sampler_handle import GivenBack, SamplerHandle
from twinkle.server.serve.sampler_on_demand import SamplerOnDemand

log = logging.getLogger("twinkle.server")

# How often in a row a lost sampler is started again, and how long to wait before the second attempt, and the third.
_ATTEMPTS = 3
_PAUSE_SECONDS = 5.0

# How often the load is looked at.
_LOOK_SECONDS = 1.0
# How long to wait where a sampler on demand could not be started.
_FAILED_SECONDS = 60.0


class SamplerPool:
    """See `serve.samplers.Samplers`. Single-threaded: used on one event loop."""

    place: SamplerPlace = "apart"

    def __init__(
        self,
        plan: Plan,
        placement: PlacementGroup,
        samplers: Sequence[SamplerHandle],
        *,
        upscale_delay: float = 5.0,
        downscale_delay: float = 60.0,
    ) -> None:
        """
        Args:
            samplers: those that are always there.
            upscale_delay, downscale_delay: seconds, as in `autoscaling.Policy`.
        """
        self._plan = plan
        self._placement = placement
        self._published: dict[str, Any] = {}  # references to adapters in the object store
        self._up = list(samplers)  # those that get samples
        self._given_up = 0
        self._changed = asyncio.Event()  # set and replaced whenever a sampler comes up or is given up
        self._keepers = [asyncio.create_task(self._keep(number, one)) for number, one in enumerate(samplers)]
        self._sequences = 0  # drawn or waiting
        self._on_demand: list[SamplerOnDemand] = []
        self._scaler: asyncio.Task[None] | None = None
        planned = _planned(plan)
        least, most = planned.processes, planned.max_processes
        if most > least:
            policy = Policy(least, most, planned.target_sequences, upscale_delay, downscale_delay)
            self._scaler = asyncio.create_task(self._follow_load(policy))

    @classmethod
    async def start(
        cls,
        plan: Plan,
        placement: PlacementGroup,
        *,
        upscale_delay: float = 5.0,
        downscale_delay: float = 60.0,
    ) -> SamplerPool:
        """Start one process on each of the bundles of `placement` that come after those of the ranks.

        Raises:
            Exception: what keeps the first of those that fail from starting; then none is left running.
        """
        starts = [
            asyncio.create_task(_start(plan, placement, number)) for number in range(_planned(plan).processes)
        ]
        try:
            samplers = await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            for ended in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(ended, SamplerHandle):
                    ray.kill(ended.actor)
            raise
        return cls(plan, placement, samplers, upscale_delay=upscale_delay, downscale_delay=downscale_delay)

    # ------------------------------------------------------------ adapters

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None:
        await self.add_adapter(sampler_adapter_id, state)

    async def add_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        """Publish an adapter, and load it into one sampler, which is then quick to sample with it, or refuses it."""
        if sampler_adapter_id in self._published:
            return
        self._published[sampler_adapter_id] = await asyncio.to_thread(lambda: cast(Any, ray.put)(state))
        while self._up:
            sampler = min(self._up, key=lambda one: one.drawing)
            try:
                await sampler.have(sampler_adapter_id, self._published[sampler_adapter_id])
                return
            except WorkerLost:
                self._take_out(sampler)
            except BaseException:
                del self._published[sampler_adapter_id]
                raise

    async def remove_adapter(self, sampler_adapter_id: str) -> None:
        self._published.pop(sampler_adapter_id, None)
        having = [one for one in self._running if one.adapters.pop(sampler_adapter_id, None) is not None]
        removals = [one.call("remove_sampler_adapter", sampler_adapter_id) for one in having]
        for outcome in await asyncio.gather(*removals, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLost):
                raise outcome

    # ------------------------------------------------------------ samples

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        """Sample where the fewest sequences are being drawn, preferably where the adapter is.

        Raises:
            WorkerLost: if that sampler is lost meanwhile: ask again.
            ServerFault: if none could be started again.
        """
        self._sequences += request.num_samples
        try:
            while True:
                sampler = await self._choose(request.adapter_id)
                with contextlib.suppress(GivenBack):
                    return await self._generate_at(sampler, request)
        finally:
            self._sequences -= request.num_samples

    async def _generate_at(self, sampler: SamplerHandle, request: GenerateRequest) -> SampleResponse:
        sampler.drawing += request.num_samples
        try:
            if request.adapter_id is not None:
                if (published := self._published.get(request.adapter_id)) is None:
                    raise NotFound(f"adapter_id: {request.adapter_id!r} is not published to the samplers")
                await sampler.have(request.adapter_id, published)
            return await sampler.generate(request)
        except WorkerLost:
            self._take_out(sampler)
            raise
        finally:
            sampler.drawing -= request.num_samples

    async def cancel(self, request_id: str) -> None:
        calls = [one.call("cancel", request_id) for one in self._running]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLost):
                raise outcome

    async def _choose(self, adapter_id: str | None) -> SamplerHandle:
        while not self._up:
            if self._given_up == len(self._keepers):
                raise ServerFault("no sampler could be started again: see the server's log")
            await self._changed.wait()
        return min(self._up, key=lambda one: one.cost(adapter_id))

    # ------------------------------------------------------------ lost ones

    async def _keep(self, number: int, sampler: SamplerHandle) -> None:
        """Replace a sampler whenever it is lost, until it can't be."""
        while True:
            loss = await sampler.connection.lost()
            self._take_out(sampler)
            ray.kill(sampler.actor)
            log.warning(
                "Sampler %d was lost (%s); it is started again. Its samples are drawn again.", number, loss
            )
            restarted = await self._start_again(number)
            if restarted is None:
                self._given_up += 1
                self._wake_waiting()
                return
            sampler = restarted
            self._up.append(sampler)
            self._wake_waiting()
            log.warning("Sampler %d is back.", number)

    def _take_out(self, sampler: SamplerHandle) -> None:
        """No call is made to it any more; whoever saw first that it is lost says so."""
        if sampler in self._up:
            self._up.remove(sampler)
        sampler.connection.close()  # it is replaced or ended, whatever it may still answer

    async def _start_again(self, number: int) -> SamplerHandle | None:
        for attempt in range(_ATTEMPTS):
            await asyncio.sleep(attempt * _PAUSE_SECONDS)
            try:
                return await _start(self._plan, self._placement, number)
            except Exception as error:
                log.error("Sampler %d could not be started: %s", number, error)
        log.error("Sampler %d is given up after %d attempts; the others sample.", number, _ATTEMPTS)
        return None

    def _wake_waiting(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # ------------------------------------------------------------ as many as the load asks for

    async def _follow_load(self, policy: Policy) -> None:
        scale = Scale(policy.min_replicas, policy.min_replicas)
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            scale = next_scale(policy, scale, self._sequences, asyncio.get_running_loop().time())
            self._have_on_demand(scale.wanted - policy.min_replicas)

    def _have_on_demand(self, wanted: int) -> None:
        """Have so many samplers beyond those that are always there. Those with the least to do go."""
        for one in self._on_demand:
            one.end_if_idle()
        staying = [one for one in self._on_demand if not one.is_leaving]
        while len(staying) < wanted:
            staying.append(self._take_back() or self._begin())
        staying.sort(key=lambda one: one.drawing)
        for one in staying[: len(staying) - wanted]:
            self._let_go(one)

    def _take_back(self) -> SamplerOnDemand | None:
        for one in self._on_demand:
            if one.is_drawing_its_last and one.handle is not None:
                one.is_leaving = False
                self._put_in(one.handle)
                return one
        return None

    def _begin(self) -> SamplerOnDemand:
        taken = {one.number for one in self._on_demand}
        number = next(number for number in itertools.count(len(self._keepers)) if number not in taken)
        log.info("Sampler %d is started: %d sequences are drawn or wait.", number, self._sequences)
        begun = SamplerOnDemand(number)
        begun.life = asyncio.create_task(self._live(begun))
        self._on_demand.append(begun)
        return begun

    def _let_go(self, leaving: SamplerOnDemand) -> None:
        leaving.is_leaving = True
        if leaving.handle is None:
            leaving.cancel()
        elif leaving.handle in self._up:
            log.info("Sampler %d ends when its last %d sequences are drawn.", leaving.number, leaving.drawing)
            self._up.remove(leaving.handle)

    async def _live(self, one: SamplerOnDemand) -> None:
        """All that becomes of it. If it is lost though it is wanted, another is begun."""
        try:
            async with one.started(self._plan) as handle:
                self._put_in(handle)
                loss = await one.lost_or_done()
                if loss is not None:
                    self._take_out(handle)
                    log.warning("Sampler %d was lost (%s). Its samples are drawn again.", one.number, loss)
        except Exception as error:
            log.error(
                "Sampler %d could not be started: %s; it is tried again in %g s, if it is still wanted.",
                one.number,
                error,
                _FAILED_SECONDS,
            )
            await asyncio.sleep(_FAILED_SECONDS)
        finally:
            self._on_demand.remove(one)

    def _put_in(self, sampler: SamplerHandle) -> None:
        """It gets samples, and also some of those that were given to others before it was there."""
        self._up.append(sampler)
        self._wake_waiting()
        share = ceil(sum(one.drawing for one in self._up) / len(self._up))
        for one in self._up:
            one.give_back(one.drawing - max(share, _planned(self._plan).target_sequences))

    # ------------------------------------------------------------ the end

    @property
    def _running(self) -> list[SamplerHandle]:
        """Those that get samples, and those that draw their last ones."""
        leaving = [one.handle for one in self._on_demand if one.is_leaving and one.handle is not None]
        return self._up + leaving

    def end(self) -> None:
        """Kill the processes."""
        self._stop_replacing()
        for sampler in self._running:
            ray.kill(sampler.actor)
        for one in self._on_demand:
            one.cancel()

    async def close(self) -> None:
        """Let the engines close what they hold; the processes end with the cluster."""
        self._stop_replacing()
        await asyncio.gather(*(one.call("close") for one in self._running), return_exceptions=True)
        lives = [one.cancel() for one in self._on_demand]
        await asyncio.gather(*lives, return_exceptions=True)

    def _stop_replacing(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        if self._scaler is not None:
            self._scaler.cancel()


def _planned(plan: Plan) -> SamplerPlan:
    assert plan.samplers is not None, "only a plan with samplers has a pool"
    return plan.samplers


async def _start(plan: Plan, placement: PlacementGroup, number: int) -> SamplerHandle:
    """One of those that are always there."""
    return await SamplerHandle.start(plan, number, placement, plan.bundle_of_sampler(number))
