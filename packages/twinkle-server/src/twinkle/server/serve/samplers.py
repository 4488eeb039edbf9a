"""What a `RankGroup` asks of its samplers, wherever they are; those beside training; and none.

Samplers with processes of their own are in `sampler_pool.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.worker import SamplerPlace, WorkerLost, only_trains
from twinkle.server.samplers.protocol import GenerateRequest

if TYPE_CHECKING:
    from twinkle.server.serve.ranks import RankGroup


class Samplers(Protocol):
    """The methods are those of `WorkerPort`."""

    @property
    def place(self) -> SamplerPlace: ...

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None: ...

    async def add_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None: ...

    async def remove_adapter(self, sampler_adapter_id: str) -> None: ...

    async def generate(self, request: GenerateRequest) -> SampleResponse: ...

    async def cancel(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


class NoSamplers:
    """Of a server that only trains."""

    place: SamplerPlace = "nowhere"

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None:
        raise only_trains()

    async def add_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        raise only_trains()

    async def remove_adapter(self, sampler_adapter_id: str) -> None:
        raise only_trains()

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        raise only_trains()

    async def cancel(self, request_id: str) -> None:
        """Nothing is drawn."""

    async def close(self) -> None:
        """There is nothing to close."""


class RankSamplers:
    """Each rank samples beside its training; they share the weights, and are lost together."""

    place: SamplerPlace = "beside training"

    def __init__(self, group: RankGroup, ranks: range) -> None:
        self._group = group
        self._ranks = ranks
        self._drawing: Counter[int] = Counter()  # sequences, by rank

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None:
        """From memory to memory on each rank: all have the adapter afterwards, or none."""
        incarnation = self._group.incarnation
        args = [(adapter_id, sampler_adapter_id)] * incarnation.num_ranks
        errors = await incarnation.each_rank("try_publish", args)
        failed = {rank: error for rank, error in enumerate(errors) if error is not None}
        for rank, error in failed.items():
            incarnation.check_device("publish", rank, error)
        if failed:
            have_it = [rank for rank in self._ranks if rank not in failed]
            await incarnation.these_ranks(have_it, "remove_sampler_adapter", sampler_adapter_id)
            raise next(iter(failed.values()))

    async def add_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        verb = "add_sampler_adapter"
        await self._group.incarnation.these_ranks(self._ranks, verb, sampler_adapter_id, state)

    async def remove_adapter(self, sampler_adapter_id: str) -> None:
        verb = "remove_sampler_adapter"
        await self._group.incarnation.these_ranks(self._ranks, verb, sampler_adapter_id)

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        """Sample on the rank that is drawing the fewest sequences."""
        rank = min(self._ranks, key=self._drawing.__getitem__)
        self._drawing[rank] += request.num_samples
        try:
            [response] = await self._group.incarnation.these_ranks([rank], "generate", request)
            return response
        finally:
            self._drawing[rank] -= request.num_samples

    async def cancel(self, request_id: str) -> None:
        with contextlib.suppress(WorkerLost):  # then the sample is gone with its process
            await self._group.incarnation.these_ranks(self._ranks, "cancel", request_id)

    async def close(self) -> None:
        """They are closed with their ranks."""
