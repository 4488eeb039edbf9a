"""One sampler with a process of its own, as the pool sees it: its start, its adapters, its samples."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle.protocol.errors import ServerFault, TwinkleError
from twinkle.protocol.types import SampleResponse
from twinkle.server.engine.worker import WorkerLost
from twinkle.server.plan import Plan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.ended import PROCESS_ENDED, is_beyond_repair
from twinkle.server.serve.rpc import Call, Connection, ConnectionLost
from twinkle.server.serve.sampler_process import SamplerProcess

# A sampler without the adapter is chosen if it draws so many sequences fewer than those that have it.
_FETCH_SEQUENCES = 8


class GivenBack(Exception):
    """A sample is to be drawn by another sampler."""


@dataclass(eq=False)
class SamplerHandle:
    """One process, from its start until it is lost or ended.

    Attributes:
        adapters: those that it has, or is fetching, by id; each task ends when the adapter is there.
        drawing: sequences.
        samples: by the answers that are waited for, oldest first.
    """

    actor: Any
    connection: Connection
    adapters: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, asyncio.Task[None]])
    drawing: int = 0
    samples: dict[asyncio.Future[Any], GenerateRequest] = field(
        default_factory=dict[asyncio.Future[Any], GenerateRequest]
    )

    @classmethod
    async def start(cls, plan: Plan, number: int, placement: PlacementGroup, bundle: int) -> SamplerHandle:
        """Start its process on a bundle of a placement group; waits for the bundle if need be.

        Args:
            number: of the sampler, for errors.

        Raises:
            Exception: what the engine raised when it loaded the model.
            ServerFault: if the process can't be started, or ended.
        """
        assert plan.samplers is not None, "only a plan with samplers starts one"
        samplers = plan.samplers
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": samplers.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=bundle
            ),
            "max_concurrency": 1000,  # it answers each call at once, or waits
        }
        if samplers.python is not None:
            options["runtime_env"] = {"py_executable": str(samplers.python)}
        actor = cast(Any, ray.remote)(SamplerProcess).options(**options).remote()
        node = ray.get_runtime_context().get_node_id()
        try:
            model_id = plan.config.model.model_id if plan.joins_cluster else None
            address = await actor.serve.remote(
                node, samplers.model, samplers.engine, samplers.max_processes, model_id
            )
            connection = await Connection.connect(address, plan.config.model.heartbeat_timeout_seconds)
        except BaseException as error:
            ray.kill(actor)
            if isinstance(error, RayTaskError) and isinstance(error.cause, TwinkleError):
                raise error.cause from error
            if isinstance(error, (*PROCESS_ENDED, OSError)):
                raise ServerFault(f"sampler {number}: its process ended while it started: {error}") from error
            raise
        return cls(actor, connection)

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

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        """
        Raises:
            GivenBack: if it is to be drawn elsewhere.
            WorkerLost: as `call`.
            Exception: as `call`.
        """
        answer = self.connection.call(Call("generate", (request,)))
        self.samples[answer] = request
        try:
            return await self._of(answer)
        finally:
            del self.samples[answer]

    def give_back(self, sequences: int) -> None:
        """Let others draw so many sequences at most, of the newest samples: these wait, or have not come far."""
        for answer, request in reversed(list(self.samples.items())):
            # Without an id it couldn't be stopped here.
            if request.request_id and request.num_samples <= sequences and not answer.done():
                sequences -= request.num_samples
                answer.set_exception(GivenBack())
                self.connection.call(Call("cancel", (request.request_id,)), wants_result=False)

    async def call(self, verb: str, *args: Any) -> Any:
        """
        Raises:
            WorkerLost: if the process ends, or can't compute any more.
            Exception: what else its engine raised.
        """
        return await self._of(self.connection.call(Call(verb, args)))

    async def _of(self, answer: asyncio.Future[Any]) -> Any:
        try:
            return await answer
        except ConnectionLost as error:
            raise WorkerLost(f"a sampler: {error}") from error
        except Exception as error:
            if is_beyond_repair(error):
                self.connection.close()
                raise WorkerLost(f"a sampler failed with {type(error).__name__}: {error}") from error
            raise
