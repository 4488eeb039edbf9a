"""Samplers with processes of their own: which one draws a sample, which adapters each has, and replacing lost ones.

A published adapter is put into Ray's object store once, where it never changes. A sampler fetches it from there, over
shared memory on one machine, when it is first to sample with it. So a new sampler needs nobody's help to begin, and a
lost one costs a retry: `generate` raises `WorkerLost`, and `SampleRunner` asks again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle.protocol.errors import NotFound, ServerFault, TwinkleError
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.worker import SamplerPlace, WorkerLost
from twinkle.server.plan import Plan
from twinkle.server.sampler_plan import SamplerPlan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.ended import PROCESS_ENDED, is_beyond_repair
from twinkle.server.serve.rpc import Call, Connection, ConnectionLost
from twinkle.server.serve.sampler_process import SamplerProcess

log = logging.getLogger("twinkle.server")

# A sampler without the adapter is chosen if it draws so many sequences fewer than those that have it.
_FETCH_SEQUENCES = 8

# How often in a row a lost sampler is started again, and how long to wait before the second attempt, and the third.
_ATTEMPTS = 3
_PAUSE_SECONDS = 5.0


@dataclass(eq=False)
class _Sampler:
    """One process, from its start until it is lost.

    Attributes:
        adapters: those that it has, or is fetching, by id; each task ends when the adapter is there.
        drawing: sequences.
    """

    actor: Any
    connection: Connection
    adapters: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, asyncio.Task[None]])
    drawing: int = 0

    def cost(self, adapter_id: str | None) -> int:
        has_it = adapter_id is None or adapter_id in self.adapters
        return self.drawing + (0 if has_it else _FETCH_SEQUENCES)

    async def have(self, adapter_id: str, published: Any) -> None:
        """
        Args:
            published: reference to the adapter in the object store.

        Raises:
            WorkerLost: if the process has ended.
            Exception: if its engine refuses the adapter.
        """
        if adapter_id not in self.adapters:
            self.adapters[adapter_id] = asyncio.create_task(self._fetch(adapter_id, published))
        try:
            await asyncio.shield(self.adapters[adapter_id])  # others may wait for it too
        except Exception:
            self.adapters.pop(adapter_id, None)
            raise

    async def _fetch(self, adapter_id: str, published: Any) -> None:
        try:
            await self.actor.add_adapter.remote(adapter_id, published)
        except PROCESS_ENDED as error:
            raise WorkerLost(f"a sampler ended: {error}") from error
        except RayTaskError as error:
            cause = cast(Exception, error.cause)
            if is_beyond_repair(cause):
                raise WorkerLost(f"a sampler failed with {type(cause).__name__}: {cause}") from error
            raise cause from error

    async def call(self, verb: str, *args: Any) -> Any:
        """
        Raises:
            WorkerLost: if the process ends, or can't compute any more.
            Exception: what else its engine raised.
        """
        try:
            return await self.connection.call(Call(verb, args))
        except ConnectionLost as error:
            raise WorkerLost(f"a sampler: {error}") from error
        except Exception as error:
            if is_beyond_repair(error):
                self.connection.close()
                raise WorkerLost(f"a sampler failed with {type(error).__name__}: {error}") from error
            raise


class SamplerPool:
    """See `serve.samplers.Samplers`. Single-threaded: used on one event loop."""

    place: SamplerPlace = "apart"

    def __init__(self, plan: Plan, placement: PlacementGroup, samplers: Sequence[_Sampler]) -> None:
        self._plan = plan
        self._placement = placement
        self._published: dict[str, Any] = {}  # references to adapters in the object store
        self._up = list(samplers)
        self._given_up = 0
        self._changed = asyncio.Event()  # set and replaced whenever a sampler comes up or is given up
        self._keepers = [asyncio.create_task(self._keep(number, one)) for number, one in enumerate(samplers)]

    @classmethod
    async def start(cls, plan: Plan, placement: PlacementGroup) -> SamplerPool:
        """Start one process on each of the bundles of `placement` that come after those of the ranks.

        Raises:
            Exception: what keeps the first of those that fail from starting; then none is left running.
        """
        starts = [
            asyncio.create_task(_start(plan, placement, number)) for number in range(_planned(plan).processes)
        ]
        try:
            return cls(plan, placement, await asyncio.gather(*starts))
        except BaseException:
            for start in starts:
                start.cancel()
            for ended in await asyncio.gather(*starts, return_exceptions=True):
                if isinstance(ended, _Sampler):
                    ray.kill(ended.actor)
            raise

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
        having = [one for one in self._up if one.adapters.pop(sampler_adapter_id, None) is not None]
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
        sampler = await self._choose(request.adapter_id)
        sampler.drawing += request.num_samples
        try:
            if request.adapter_id is not None:
                if (published := self._published.get(request.adapter_id)) is None:
                    raise NotFound(f"adapter_id: {request.adapter_id!r} is not published to the samplers")
                await sampler.have(request.adapter_id, published)
            return await sampler.call("generate", request)
        except WorkerLost:
            self._take_out(sampler)
            raise
        finally:
            sampler.drawing -= request.num_samples

    async def cancel(self, request_id: str) -> None:
        calls = [one.call("cancel", request_id) for one in self._up]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerLost):
                raise outcome

    async def _choose(self, adapter_id: str | None) -> _Sampler:
        while not self._up:
            if self._given_up == len(self._keepers):
                raise ServerFault("no sampler could be started again: see the server's log")
            await self._changed.wait()
        return min(self._up, key=lambda one: one.cost(adapter_id))

    # ------------------------------------------------------------ lost ones

    async def _keep(self, number: int, sampler: _Sampler) -> None:
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

    def _take_out(self, sampler: _Sampler) -> None:
        """No call is made to it any more; whoever saw first that it is lost says so."""
        if sampler in self._up:
            self._up.remove(sampler)
            sampler.connection.close()  # its keeper replaces it, whatever it may still answer

    async def _start_again(self, number: int) -> _Sampler | None:
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

    def end(self) -> None:
        """Kill the processes."""
        for keeper in self._keepers:
            keeper.cancel()
        for sampler in self._up:
            ray.kill(sampler.actor)

    async def close(self) -> None:
        """Let the engines close what they hold; the processes end with the cluster."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*(one.call("close") for one in self._up), return_exceptions=True)


def _planned(plan: Plan) -> SamplerPlan:
    assert plan.samplers is not None, "only a plan with samplers has a pool"
    return plan.samplers


async def _start(plan: Plan, placement: PlacementGroup, number: int) -> _Sampler:
    """
    Raises:
        Exception: what the engine raised when it loaded the model.
        ServerFault: if the process can't be started, or ended.
    """
    samplers = _planned(plan)
    bundle = PlacementGroupSchedulingStrategy(
        placement, placement_group_bundle_index=plan.bundle_of_sampler(number)
    )
    options: dict[str, Any] = {
        "num_cpus": 1,
        "num_gpus": samplers.gpus,
        "scheduling_strategy": bundle,
        "max_concurrency": 1000,  # it answers each call at once, or waits
    }
    if samplers.python is not None:
        options["runtime_env"] = {"py_executable": str(samplers.python)}
    actor = cast(Any, ray.remote)(SamplerProcess).options(**options).remote()
    threads = max(1, (os.cpu_count() or 1) // samplers.processes)
    node = ray.get_runtime_context().get_node_id()
    try:
        model_id = plan.config.model.model_id if plan.joins_cluster else None
        address = await actor.serve.remote(node, samplers.model, samplers.engine, threads, model_id)
        connection = await Connection.connect(address, plan.config.model.heartbeat_timeout_seconds)
    except BaseException as error:
        ray.kill(actor)
        if isinstance(error, RayTaskError) and isinstance(error.cause, TwinkleError):
            raise error.cause from error
        if isinstance(error, (*PROCESS_ENDED, OSError)):
            raise ServerFault(f"sampler {number}: its process ended while it started: {error}") from error
        raise
    return _Sampler(actor, connection)
