"""The processes that compute, behind one `WorkerPort`: one Ray actor a rank, in one placement group."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle.protocol.errors import ServerFault, TwinkleError
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    ModelConfig,
    Row,
    RowResult,
    StepOutcome,
)
from twinkle.server.engine.worker import Trained, WorkerLost
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.generation import Generation, ProcessEnded
from twinkle.server.serve.rank import Rank
from twinkle.server.serve.rpc import Call, Line, LineBroken

# What Ray says when a process is gone; OutOfMemoryError is the machine's memory, when Ray ended the process for it.
_PROCESS_ENDED = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


@dataclass(frozen=True)
class _Recipe:
    """All that it takes to start the ranks, once and again."""

    placement: PlacementGroup
    config: ModelConfig
    backend: str
    sampler: str


class RankActor:
    """A `RankProcess`: an actor that Ray placed and watches, and a line to it."""

    def __init__(self, actor: Any, line: Line) -> None:
        self._actor = actor
        self._line = line

    async def call(self, call: Call) -> Any:
        try:
            return await self._line.call(call)
        except LineBroken as error:
            raise ProcessEnded from error

    async def ended(self) -> None:
        signs = {asyncio.create_task(self._died()), asyncio.create_task(self._line.broken())}
        try:
            await asyncio.wait(signs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for sign in signs:
                sign.cancel()

    async def _died(self) -> None:
        """Ray notices what a line doesn't: that the whole machine is gone."""
        with contextlib.suppress(*_PROCESS_ENDED):
            await self._actor.live.remote()

    def end(self) -> None:
        self._line.close()
        ray.kill(self._actor)


class RankGroup:
    """A `WorkerPort` over the ranks' processes."""

    def __init__(
        self, recipe: _Recipe, generation: Generation, info: BaseModelInfo, loss_fns: LossSpecs
    ) -> None:
        self._recipe = recipe
        self._generation = generation
        self._info = info
        self._loss_fns = loss_fns
        self._is_given_up = False
        self._training = asyncio.Lock()
        self._restarted = asyncio.Event()  # set and replaced by each restart, whatever came of it

    @classmethod
    async def start(
        cls,
        placement: PlacementGroup,
        config: ModelConfig,
        backend: str,
        sampler: str,
        first: Sequence[Any] | None = None,
    ) -> RankGroup:
        """Start one actor on each bundle of `placement`.

        Args:
            first: such actors that are there already, to be used unless another group has them.

        Raises:
            Exception: what the ranks raised when they loaded the model.
            ServerFault: if one of them ended, or only some could load it.
        """
        recipe = _Recipe(placement, config, backend, sampler)
        try:
            return cls(recipe, *await _start(recipe, first))
        except WorkerLost as loss:
            raise ServerFault(f"the model's process ended while it started ({loss.reason})") from loss

    async def restart(self) -> None:
        self._generation.end()
        try:
            self._generation, self._info, self._loss_fns = await _start(self._recipe)
        except WorkerLost:
            raise  # it may be tried again
        except BaseException:
            self._is_given_up = True
            raise
        finally:
            restarted, self._restarted = self._restarted, asyncio.Event()
            restarted.set()

    async def lost(self) -> WorkerLost:
        return await self._generation.lost()

    async def available(self) -> None:
        while self._generation.is_lost:
            if self._is_given_up:
                raise ServerFault("the process that held the model ended, and could not be started anew")
            await self._restarted.wait()

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def loss_fns(self) -> LossSpecs:
        return self._loss_fns

    # ------------------------------------------------------------ training

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        await self._generation.all_ranks("add_adapter", adapter_id, spec)

    async def remove_adapter(self, adapter_id: str) -> None:
        await self._generation.all_ranks("remove_adapter", adapter_id)

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        return await self._generation.all_ranks("forward_backward", micro_batches)

    async def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        return await self._generation.all_ranks("optim_step", steps)

    async def train(self, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]) -> Trained:
        if self._recipe.config.num_ranks == 1:
            return await self._generation.all_ranks("train", micro_batches, steps)
        async with self._training:  # in two calls, in each of which the ranks agree
            results = await self.forward_backward(micro_batches)
            try:
                return results, await self.optim_step(steps)
            except WorkerLost:
                raise
            except Exception:  # it comes again when the steps are called alone
                return results, None

    async def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        return await self._generation.all_ranks("export_adapter", adapter_id, with_optimizer, with_gradients)

    async def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        await self._generation.all_ranks("import_adapter", adapter_id, state)

    async def publish(self, adapter_id: str, sampler_adapter_id: str) -> None:
        error = await self._generation.all_ranks("publish", adapter_id, sampler_adapter_id)
        if error is not None:
            self._generation.check_device("publish", error)
            raise error

    async def close(self) -> None:
        await self._generation.close()

    # ------------------------------------------------------------ sampling

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._generation.first_rank("add_sampler_adapter", sampler_adapter_id, state)

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await self._generation.first_rank("remove_sampler_adapter", sampler_adapter_id)

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        return await self._generation.first_rank("generate", request)

    async def cancel(self, request_id: str) -> None:
        with contextlib.suppress(WorkerLost):  # then the sample has gone with its process
            await self._generation.first_rank("cancel", request_id)


async def _start(
    recipe: _Recipe, first: Sequence[Any] | None = None
) -> tuple[Generation, BaseModelInfo, LossSpecs]:
    """Actors with the model loaded; if that fails none is left.

    Raises:
        Exception: what the ranks raised; if some raised and others didn't, the error that is meant for people.
        WorkerLost: if there is none, or a process ended.
    """
    generation = Generation(await _connect_any(recipe, first))
    try:
        rendezvous = None
        if recipe.config.num_ranks > 1:
            rendezvous = await generation.first_rank("find_rendezvous")
        configs = [
            replace(recipe.config, rank=rank, rendezvous=rendezvous)
            for rank in range(recipe.config.num_ranks)
        ]
        started = await generation.each_rank(
            "start", [(config, recipe.backend, recipe.sampler) for config in configs]
        )
    except BaseException as error:
        generation.end()
        if isinstance(error, WorkerLost) and isinstance(error.__cause__, TwinkleError):
            raise error.__cause__ from error
        raise
    return generation, *started


async def _connect_any(recipe: _Recipe, first: Sequence[Any] | None) -> list[RankActor]:
    if first is not None:
        with contextlib.suppress(WorkerLost):
            return await _connect(first)
    return await _connect(place_ranks(recipe.placement, recipe.config, recipe.backend, recipe.sampler))


async def _connect(actors: Sequence[Any]) -> list[RankActor]:
    """Lines to actors; if one can't be had, all actors are ended.

    Raises:
        WorkerLost: if one of them ended, or is another group's.
    """
    node = ray.get_runtime_context().get_node_id()
    try:
        addresses = await asyncio.gather(*(actor.listen.remote(node) for actor in actors))
        if None in addresses:
            raise WorkerLost("its ranks are another engine's")
        lines = [await Line.connect(address) for address in addresses]
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        if isinstance(error, (*_PROCESS_ENDED, OSError)):
            raise WorkerLost(f"it ended as it was started: {error}") from error
        raise
    return [RankActor(actor, line) for actor, line in zip(actors, lines, strict=True)]


def place_ranks(placement: PlacementGroup, config: ModelConfig, backend: str, sampler: str) -> list[Any]:
    """New actors, one on each bundle, which import at once what they will need."""
    actor_class = cast(Any, ray.remote)(concurrency_groups={"life": 1})(Rank)
    actors = [
        actor_class.options(
            num_cpus=1,
            num_gpus=placement.bundle_specs[bundle].get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=bundle
            ),
        ).remote()
        for bundle in range(placement.bundle_count)
    ]
    for actor in actors:
        actor.preload.remote(config, backend, sampler)
    return actors
