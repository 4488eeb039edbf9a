"""The processes that compute: one Ray actor a rank, in one placement group, behind one `WorkerPort`.

Every rank gets every call, in the same order; the first rank's result is the result. With one rank that is one actor.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server.app import build_worker
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    ModelConfig,
    Row,
    RowResult,
)
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.samplers.protocol import GenerateRequest

R = TypeVar("R")

# More samples than a server ever has under way, so that none of them holds up a training call.
_MAX_SAMPLES = 100_000


class Rank:
    """A `LocalWorker` in a process of its own."""

    _worker: LocalWorker

    async def start(self, config: ModelConfig, backend: str, sampler: str) -> tuple[BaseModelInfo, LossSpecs]:
        """Load the model. (Not in the constructor: an error there would reach nobody as what it is.)"""
        if config.device == "cpu":
            import torch

            torch.set_num_threads(
                os.cpu_count() or 1
            )  # Ray sets it to the CPUs that it accounts to this actor
        self._worker = await asyncio.to_thread(build_worker, config, backend, sampler)
        return self._worker.info, self._worker.loss_fns

    async def ping(self) -> None:
        """Answered as long as the process lives."""

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        await self._worker.add_adapter(adapter_id, spec)

    async def remove_adapter(self, adapter_id: str) -> None:
        await self._worker.remove_adapter(adapter_id)

    async def forward_backward(self, micro_batches: list[list[Row]]) -> list[list[RowResult]]:
        return await self._worker.forward_backward(micro_batches)

    async def optim_step(self, steps: list[AdamStep]) -> list[dict[str, float]]:
        return await self._worker.optim_step(steps)

    async def export_adapter(self, adapter_id: str, with_optimizer: bool) -> AdapterState:
        return await self._worker.export_adapter(adapter_id, with_optimizer)

    async def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        await self._worker.import_adapter(adapter_id, state)

    async def publish(self, adapter_id: str, sampler_adapter_id: str) -> None:
        await self._worker.publish(adapter_id, sampler_adapter_id)

    @ray.method(concurrency_group="sampling")
    async def cancel(self, request_id: str) -> None:
        await self._worker.cancel(request_id)

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._worker.add_sampler_adapter(sampler_adapter_id, state)

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await self._worker.remove_sampler_adapter(sampler_adapter_id)

    @ray.method(concurrency_group="sampling")
    async def generate(self, request: GenerateRequest) -> SampleResponse:
        try:
            return await self._worker.generate(request)
        except asyncio.CancelledError as error:  # as such it would end this call in Ray's own way, and loudly
            raise ServerFault("the sample was cancelled") from error

    async def close(self) -> None:
        await self._worker.close()


class RankGroup:
    """A `WorkerPort` over Ray actors."""

    def __init__(self, ranks: list[Any], info: BaseModelInfo, loss_fns: LossSpecs) -> None:
        self._ranks = ranks
        self._info = info
        self._loss_fns = loss_fns

    @classmethod
    async def start(
        cls, group: PlacementGroup, config: ModelConfig, backend: str, sampler: str, gpus_per_rank: float
    ) -> RankGroup:
        """Start one actor on each bundle of `group` after the first (which is the caller's own)."""
        actor_class = cast(Any, ray.remote)(concurrency_groups={"sampling": _MAX_SAMPLES})(Rank)
        ranks = [
            actor_class.options(
                num_cpus=1,
                num_gpus=gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
            ).remote()
            for i in range(1, group.bundle_count)
        ]
        started = [_unwrap(rank.start.remote(config, backend, sampler)) for rank in ranks]
        info, loss_fns = (await asyncio.gather(*started))[0]
        return cls(ranks, info, loss_fns)

    @property
    def info(self) -> BaseModelInfo:
        return self._info

    @property
    def loss_fns(self) -> LossSpecs:
        return self._loss_fns

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        await self._all([rank.add_adapter.remote(adapter_id, spec) for rank in self._ranks])

    async def remove_adapter(self, adapter_id: str) -> None:
        await self._all([rank.remove_adapter.remote(adapter_id) for rank in self._ranks])

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        batches = ray.put(micro_batches)
        return await self._all([rank.forward_backward.remote(batches) for rank in self._ranks])

    async def optim_step(self, steps: Sequence[AdamStep]) -> list[dict[str, float]]:
        return await self._all([rank.optim_step.remote(steps) for rank in self._ranks])

    async def export_adapter(self, adapter_id: str, with_optimizer: bool) -> AdapterState:
        return await self._all(
            [rank.export_adapter.remote(adapter_id, with_optimizer) for rank in self._ranks]
        )

    async def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        await self._all([rank.import_adapter.remote(adapter_id, state) for rank in self._ranks])

    async def publish(self, adapter_id: str, sampler_adapter_id: str) -> None:
        await self._all([rank.publish.remote(adapter_id, sampler_adapter_id) for rank in self._ranks])

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._all([rank.add_sampler_adapter.remote(sampler_adapter_id, state) for rank in self._ranks])

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await self._all([rank.remove_sampler_adapter.remote(sampler_adapter_id) for rank in self._ranks])

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        return await _unwrap(self._ranks[0].generate.remote(request))

    async def cancel(self, request_id: str) -> None:
        await _unwrap(self._ranks[0].cancel.remote(request_id))

    async def close(self) -> None:
        await self._all([rank.close.remote() for rank in self._ranks])

    async def check(self) -> None:
        """
        Raises:
            ServerFault: if a rank's process is gone.
        """
        await self._all([rank.ping.remote() for rank in self._ranks])

    async def _all(self, calls: list[Awaitable[R]]) -> R:
        return (await asyncio.gather(*(_unwrap(call) for call in calls)))[0]


async def _unwrap(call: Awaitable[R]) -> R:
    """The call's result, or what it raised as it was raised."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause from error  # pyright: ignore
    except RayActorError as error:
        raise ServerFault(
            "the model's process ended; it is being started anew, and its adapters are lost"
        ) from error
