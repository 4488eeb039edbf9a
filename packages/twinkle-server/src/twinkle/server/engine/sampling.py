"""Runs samples: each brings its adapter into the sampler, generates, and completes its future.

Samples have no order between them; the sampling engine batches those of all tenants and is fair between them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import AsyncExitStack

import numpy as np

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.adapters import AdapterKeeper
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.store import tables

# How many accepted samples are remembered for retries of the same (sampling session, seq_id).
MAX_REMEMBERED = 65_536


class SampleRunner:
    """Accepts samples and sees each through. Single-threaded: called on one event loop."""

    def __init__(
        self,
        futures: FutureTable,
        worker: WorkerPort,
        sampler_adapters: SamplerAdapters,
        keeper: AdapterKeeper,
    ) -> None:
        self._futures = futures
        self._worker = worker
        self._sampler_adapters = sampler_adapters
        self._keeper = keeper
        self._accepted: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._under_way: set[asyncio.Task[None]] = set()

    def submit(self, sampler: tables.Sampler, request: m.SampleRequest) -> m.Promise:
        """Begin a sample, or answer with the promise of the first that had its (sampling session, seq_id)."""
        key = (request.sampling_session_id, request.seq_id)
        request_id = self._accepted.get(key)
        if request_id is None:
            request_id = self._accepted[key] = self._futures.create(sampler.tenant)
            if len(self._accepted) > MAX_REMEMBERED:
                self._accepted.popitem(last=False)
            task = asyncio.create_task(self._run(request_id, sampler, request))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        sequence_ids = [f"{request_id}:{i}" for i in range(request.num_samples)]
        return m.Promise(request_id=request_id, sample_sequence_ids=sequence_ids)

    async def close(self) -> None:
        """Cancel what is under way."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _run(self, request_id: str, sampler: tables.Sampler, request: m.SampleRequest) -> None:
        try:
            self._futures.complete(request_id, await self._generate(sampler, request))
        except Exception as error:
            self._futures.complete(request_id, to_failure(error, f"sample {request.seq_id} of {sampler.id}"))

    async def _generate(self, sampler: tables.Sampler, request: m.SampleRequest) -> SampleResponse:
        async with AsyncExitStack() as stack:
            adapter_id: str | None = None
            if sampler.model_path is not None:
                # A checkpoint that was overwritten since is another adapter than this sampler's.
                key = (
                    f"{sampler.model_path}@{sampler.checkpoint_time}"
                    if sampler.checkpoint_time
                    else sampler.model_path
                )
                adapter_id = await stack.enter_async_context(
                    self._sampler_adapters.use(key, lambda: self._read(sampler))
                )
            return await self._worker.generate(
                GenerateRequest(
                    tenant=sampler.tenant,
                    adapter_id=adapter_id,
                    prompt=request.prompt.tokens().astype(np.int64),
                    params=request.sampling_params,
                    num_samples=request.num_samples,
                    prompt_logprobs=request.prompt_logprobs,
                    topk_prompt_logprobs=request.topk_prompt_logprobs,
                    topk_sample_logprobs=request.topk_sample_logprobs,
                )
            )

    async def _read(self, sampler: tables.Sampler) -> AdapterState:
        assert sampler.model_path is not None, "a base model's sampler has nothing to read"
        checkpoint = await self._keeper.find(sampler.tenant, sampler.model_path, "model_path")
        if sampler.checkpoint_time is not None and checkpoint.created_at != sampler.checkpoint_time:
            raise NotFound(
                f"model_path: {sampler.model_path!r} was overwritten since this sampling client was made; "
                "make a new one"
            )
        return await self._keeper.read(uris.parse(sampler.model_path))
