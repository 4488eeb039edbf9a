"""Runs samples: each brings its adapter into the sampler, generates, and completes its future.

Samples have no order between them; the sampling engine batches those of all tenants and is fair between them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Literal

import numpy as np

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import Int64Array, SampleResponse, SparseTensor, TensorData
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.engine.adapters import AdapterKeeper
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.store import tables
from twinkle.server.store.ledger import Ledger

# How many accepted samples are remembered for retries of the same (sampling session, seq_id).
MAX_REMEMBERED = 65_536

# The sequence ids of the n-th client that joined a sampling session begin at n times this.
IDS_OF_A_CLIENT = 1_000_000_000


class SampleRunner:
    """Accepts samples and sees each through. Single-threaded: called on one event loop."""

    def __init__(
        self,
        futures: FutureTable,
        worker: WorkerPort,
        sampler_adapters: SamplerAdapters,
        keeper: AdapterKeeper,
        completions: CompletionLog,
        ledger: Ledger,
    ) -> None:
        self._futures = futures
        self._worker = worker
        self._sampler_adapters = sampler_adapters
        self._keeper = keeper
        self._completions = completions
        self._ledger = ledger
        self._accepted: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._under_way: dict[str, tuple[str, asyncio.Task[None]]] = {}  # request id -> tenant, its task
        self._cancelling: set[asyncio.Task[None]] = set()

    def submit(
        self,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        targets: TensorData | SparseTensor | None = None,
    ) -> m.Promise:
        """Begin a sample, or answer with the promise of the first that had its (sampling session, seq_id).

        Args:
            targets: the request's `target_prompt_logprobs`, decoded and checked.
        """
        key = (request.sampling_session_id, request.seq_id)
        request_id = self._accepted.get(key)
        if request_id is None:
            request_id = self._accepted[key] = self._futures.create(sampler.tenant)
            if len(self._accepted) > MAX_REMEMBERED:
                self._accepted.popitem(last=False)
            task = asyncio.create_task(self._run(request_id, sampler, request, targets))
            self._under_way[request_id] = (sampler.tenant, task)
            task.add_done_callback(lambda _task: self._under_way.pop(request_id, None))
        sequence_ids = [f"{request_id}:{i}" for i in range(request.num_samples)]
        return m.Promise(request_id=request_id, sample_sequence_ids=sequence_ids)

    def cancel(self, tenant: str, request_id: str) -> None:
        """Stop a sample that nobody waits for; one that has ended, is unknown or another's is left as it is."""
        owner, task = self._under_way.get(request_id, ("", None))
        if task is None or owner != tenant:
            return
        failure = m.Failure(error="the sample was cancelled by its client", category="user")
        self._futures.complete(request_id, failure)
        task.cancel()
        cancelling = asyncio.create_task(self._worker.cancel(request_id))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = [task for _, task in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._cancelling, return_exceptions=True)

    async def _run(
        self,
        request_id: str,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        targets: TensorData | SparseTensor | None,
    ) -> None:
        state: Literal["finished", "failed"] = "failed"
        try:
            response = await self._generate_or_again(request_id, sampler, request, targets)
            self._futures.complete(request_id, response)
            self._record(sampler, request, response)
            state = "finished"
        except asyncio.CancelledError:
            stopped = m.Failure(
                error="the sampling engine stopped before the sample was done", category="server"
            )
            self._futures.complete(request_id, stopped)
            raise
        except Exception as error:
            self._futures.complete(request_id, to_failure(error, f"sample {request.seq_id} of {sampler.id}"))
        finally:
            target = (sampler.id, request.seq_id // IDS_OF_A_CLIENT)
            self._completions.add(target, m.Completion(state=state, request_id=request_id))

    def _record(self, sampler: tables.Sampler, request: m.SampleRequest, response: SampleResponse) -> None:
        tokens = sum(len(sequence.tokens) for sequence in response.sequences)
        self._ledger.record(sampler.tenant, sampler.session_id, "sampling_prefill", request.prompt.length)
        self._ledger.record(sampler.tenant, sampler.session_id, "sampling_sample", tokens)

    async def _generate_or_again(
        self,
        request_id: str,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        targets: TensorData | SparseTensor | None,
    ) -> SampleResponse:
        """A sample changes nothing, so one that was lost with its process is drawn again, and its client never knows.

        Once: it may be what ended the process.
        """
        try:
            return await self._generate(request_id, sampler, request, targets)
        except WorkerLost:
            await self._worker.available()
            return await self._generate(request_id, sampler, request, targets)

    async def _generate(
        self,
        request_id: str,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        targets: TensorData | SparseTensor | None,
    ) -> SampleResponse:
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
            response = await self._worker.generate(
                GenerateRequest(
                    tenant=sampler.tenant,
                    adapter_id=adapter_id,
                    prompt=request.prompt.tokens().astype(np.int64),
                    params=request.sampling_params,
                    num_samples=request.num_samples,
                    prompt_logprobs=request.prompt_logprobs,
                    topk_prompt_logprobs=request.topk_prompt_logprobs,
                    topk_sample_logprobs=request.topk_sample_logprobs,
                    prompt_logprobs_last_n=request.prompt_logprobs_last_n,
                    target_tokens=None if targets is None else _dense(targets),
                    prompt_alt_tokens_k=request.prompt_alt_tokens_k,
                    request_id=request_id,
                )
            )
        return _in_layout_of(targets, response) if isinstance(targets, SparseTensor) else response

    async def _read(self, sampler: tables.Sampler) -> AdapterState:
        assert sampler.model_path is not None, "a base model's sampler has nothing to read"
        checkpoint = await self._keeper.find(sampler.tenant, sampler.model_path, "model_path")
        if sampler.checkpoint_time is not None and checkpoint.created_at != sampler.checkpoint_time:
            raise NotFound(
                f"model_path: {sampler.model_path!r} was overwritten since this sampling client was made; "
                "make a new one"
            )
        return await self._keeper.read(uris.parse(sampler.model_path))


def _dense(targets: TensorData | SparseTensor) -> Int64Array:
    array = targets.to_numpy(pad_value=-1) if isinstance(targets, SparseTensor) else targets.array
    return array.astype(np.int64, copy=False)


def _in_layout_of(targets: SparseTensor, response: SampleResponse) -> SampleResponse:
    """The log-probabilities of the listed tokens alone, in the order of the list."""
    assert isinstance(response.target_prompt_logprobs, TensorData), "engines answer with dense tensors"
    values = response.target_prompt_logprobs.array[targets.row_indices(), targets.col_indices]
    return replace(response, target_prompt_logprobs=replace(targets, values=values))
