"""One process that computes: a Ray actor around a `LocalWorker`, called over a socket of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from typing import cast

import ray

from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server import plugins
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
from twinkle.server.engine.worker import LocalWorker, Trained, build_worker
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.ray_place import place
from twinkle.server.serve.rpc import Address, listen


class Rank:
    """A `LocalWorker` in a process of its own. Ray calls `preload`, `listen` and `live`, and no other.

    Results of training calls come from the first rank alone: the others have the same ones, and answer None.
    """

    _worker: LocalWorker
    _is_first: bool
    _is_taken = False

    async def preload(self, config: ModelConfig, backend: str, sampler: str) -> None:
        """Import what `start` needs, which takes longer than the rest of it."""
        if config.device == "cpu":
            # A core is shared with those who bring the work: threads that wait for each other give it away. (By
            # default they spin, and a step takes up to thirty times as long when another program wants the core.)
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with contextlib.suppress(Exception):  # they come again in `start`, which has somebody to tell
            plugins.find(plugins.TRAINING_BACKENDS, backend)
            plugins.find(plugins.SAMPLING_ENGINES, sampler)

    async def listen(self, callers_node: str) -> Address | None:
        """Take calls of the other methods. None if they are another caller's already.

        Args:
            callers_node: Ray's id of the machine that they come from.
        """
        if self._is_taken:
            return None
        self._is_taken = True
        is_here = callers_node == ray.get_runtime_context().get_node_id()
        return await listen(self, None if is_here else cast(str, ray.util.get_node_ip_address()))

    @ray.method(concurrency_group="life")
    async def live(self) -> None:
        """Never answered: the call ends, with an error, when the process does."""
        await asyncio.Event().wait()

    async def find_rendezvous(self) -> str:
        """Where the group can meet, all of which is on this machine: a file that no other user can get at."""
        return f"file://{tempfile.mkdtemp(prefix='twinkle-', dir=place())}/meeting"

    async def start(self, config: ModelConfig, backend: str, sampler: str) -> tuple[BaseModelInfo, LossSpecs]:
        """Load the model. (Not in the constructor: an error there would reach nobody as what it is.)"""
        if config.device == "cpu":
            import torch

            # Ray sets it to the CPUs that it accounts to this actor.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.num_ranks))
        self._is_first = config.rank == 0
        self._worker = await asyncio.to_thread(build_worker, config, backend, sampler)
        return self._worker.info, self._worker.loss_fns

    # ------------------------------------------------------------ training: on every rank

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        await self._worker.add_adapter(adapter_id, spec)

    async def remove_adapter(self, adapter_id: str) -> None:
        await self._worker.remove_adapter(adapter_id)

    async def forward_backward(self, micro_batches: list[list[Row]]) -> list[list[RowResult]] | None:
        results = await self._worker.forward_backward(micro_batches)
        return results if self._is_first else None

    async def optim_step(self, steps: list[AdamStep]) -> list[StepOutcome] | None:
        metrics = await self._worker.optim_step(steps)
        return metrics if self._is_first else None

    async def train(self, micro_batches: list[list[Row]], steps: list[AdamStep]) -> Trained:
        """Only where there is one rank: several would not notice that they disagree about the steps."""
        return await self._worker.train(micro_batches, steps)

    async def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool
    ) -> AdapterState | None:
        state = await self._worker.export_adapter(adapter_id, with_optimizer, with_gradients)
        return state if self._is_first else None

    async def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        await self._worker.import_adapter(adapter_id, state)

    async def publish(self, adapter_id: str, sampler_adapter_id: str) -> Exception | None:
        """Every rank takes part in the copy, the first one's sampler gets it. What goes wrong there is answered, not
        raised: the ranks don't disagree over it.
        """
        state = await self._worker.export_adapter(adapter_id, with_optimizer=False)
        if self._is_first:
            try:
                await self._worker.add_sampler_adapter(sampler_adapter_id, state)
            except Exception as error:
                return error
        return None

    async def close(self) -> None:
        await self._worker.close()

    # ------------------------------------------------------------ sampling: on the first rank

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._worker.add_sampler_adapter(sampler_adapter_id, state)

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await self._worker.remove_sampler_adapter(sampler_adapter_id)

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        try:
            return await self._worker.generate(request)
        except asyncio.CancelledError as error:  # nobody cancelled this call, only the sample
            raise ServerFault("the sample was cancelled") from error

    async def cancel(self, request_id: str) -> None:
        await self._worker.cancel(request_id)
