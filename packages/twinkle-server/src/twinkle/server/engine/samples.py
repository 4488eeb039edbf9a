"""Runs samples: each brings its adapter into the sampler, generates, and completes its future.

Samples have no order between them; the sampling engine batches those of all tenants and is fair between them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import Conflict, NotFound
from twinkle.protocol.operations import Encoded
from twinkle.protocol.types import Int64Array, SampleResponse, SparseTensor, TensorData
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.engine.failures import to_failure
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.store import tables
from twinkle.server.store.ledger import Ledger

log = logging.getLogger("twinkle.server")

# How many accepted samples are remembered for retries of the same (sampling session, seq_id).
MAX_REMEMBERED = 65_536

# The sequence ids of the n-th client that joined a sampling session begin at n times this.
IDS_OF_A_CLIENT = 1_000_000_000


_AWAY = (
    "the sample was stopped: its client sent no heartbeat and asked for nothing for a quarter of an hour; send the "
    "request again"
)


@dataclass(frozen=True, eq=False)
class _Sample:
    """One that was accepted and has not ended, with the task that sees it through, or did until it was paused."""

    sampler: tables.Sampler
    request: m.SampleRequest
    targets: TensorData | SparseTensor | None
    task: asyncio.Task[None]

    @property
    def tenant(self) -> str:
        return self.sampler.tenant

    @property
    def session_id(self) -> str:
        return self.sampler.session_id


class SampleRunner:
    """Accepts samples and sees each through. Single-threaded: called on one event loop."""

    def __init__(
        self,
        futures: FutureTable,
        worker: WorkerPort,
        sampler_adapters: SamplerAdapters,
        checkpoints: Checkpoints,
        completions: CompletionLog,
        ledger: Ledger,
        tokens: RateLimit,
    ) -> None:
        """
        Args:
            tokens: charged for sampled tokens.
        """
        self._futures = futures
        self._worker = worker
        self._sampler_adapters = sampler_adapters
        self._checkpoints = checkpoints
        self._completions = completions
        self._ledger = ledger
        self._tokens = tokens
        # (sampling session, seq_id) -> request id and the request's digest
        self._accepted: OrderedDict[tuple[str, int], tuple[str, bytes]] = OrderedDict()
        self._under_way: dict[str, _Sample] = {}
        self._paused: dict[str, _Sample] = {}
        # Those that are stopped, and whose samples are not over.
        self._pausing: set[asyncio.Task[None]] = set()
        self._cancelling: set[asyncio.Task[None]] = set()

    def first_of(self, request: m.SampleRequest, digest: bytes) -> m.Promise | None:
        """The promise of the first request that had this one's (sampling session, seq_id), if there was one.

        Raises:
            Conflict: if that one asked for something else.
        """
        first = self._accepted.get((request.sampling_session_id, request.seq_id))
        if first is None:
            return None
        request_id, known = first
        if known and digest and digest != known:
            raise Conflict(
                f"seq_id: {request.seq_id} was used before in this sampling session, for a sample that asks for "
                "something else: a request that is sent again must be the same, and another needs a new number"
            )
        return _promise(request_id, request)

    def begin(
        self,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        request_id: str,
        digest: bytes,
        targets: TensorData | SparseTensor | None = None,
    ) -> m.Promise:
        """Begin a sample whose future there is.

        Args:
            digest: of the request; empty if it is never sent again.
            targets: the request's `target_prompt_logprobs`, decoded and checked.
        """
        self._remember(request, request_id, digest)
        self._start(request_id, sampler, request, targets)
        return _promise(request_id, request)

    def _start(
        self,
        request_id: str,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        targets: TensorData | SparseTensor | None,
    ) -> None:
        task = asyncio.create_task(self._run(request_id, sampler, request, targets))
        sample = self._under_way[request_id] = _Sample(sampler, request, targets, task)

        def ended(_task: object) -> None:
            if self._under_way.get(request_id) is sample:
                del self._under_way[request_id]

        task.add_done_callback(ended)

    def restore(
        self,
        sampler: tables.Sampler,
        request: m.SampleRequest,
        request_id: str,
        digest: bytes,
        outcome: Encoded,
    ) -> m.Promise:
        """A sample that an earlier process has drawn."""
        self._remember(request, request_id, digest)
        self._note_end(sampler, request, request_id, is_failure=outcome.kind == m.Failure.__name__)
        return _promise(request_id, request)

    def _remember(self, request: m.SampleRequest, request_id: str, digest: bytes) -> None:
        self._accepted[request.sampling_session_id, request.seq_id] = request_id, digest
        if len(self._accepted) > MAX_REMEMBERED:
            self._accepted.popitem(last=False)

    def _note_end(
        self, sampler: tables.Sampler, request: m.SampleRequest, request_id: str, is_failure: bool
    ) -> None:
        target = (sampler.id, request.seq_id // IDS_OF_A_CLIENT)
        state: Literal["finished", "failed"] = "failed" if is_failure else "finished"
        self._completions.add(target, m.Completion(state=state, request_id=request_id))

    def cancel(self, tenant: str, request_id: str) -> None:
        """Stop a sample that nobody waits for; one that has ended, is unknown or another's is left as it is."""
        if self.session_of(tenant, request_id) is None:
            return
        failure = m.Failure(error="the sample was cancelled by its client", category="user")
        self._end(request_id, failure)

    def _end(self, request_id: str, failure: m.Failure) -> None:
        """A sample that is under way, or paused, fails."""
        self._futures.complete(request_id, failure)
        paused = self._paused.pop(request_id, None)
        if paused is not None:
            self._note_end(paused.sampler, paused.request, request_id, is_failure=True)
        else:
            self._stop(request_id)

    def _stop(self, request_id: str) -> None:
        """Draw no more of a sample."""
        self._under_way[request_id].task.cancel()
        cancelling = asyncio.create_task(self._worker.cancel(request_id))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    def cancel_all(self, session_id: str) -> None:
        """Stop all samples of a session: nobody is left to wait for them."""
        for request_id, sample in [*self._under_way.items(), *self._paused.items()]:
            if sample.session_id == session_id:
                self.cancel(sample.tenant, request_id)

    # ------------------------------------------------------------ clients that are away

    def session_of(self, tenant: str, request_id: str) -> str | None:
        """Of a tenant's sample that has not ended; None if it has, is unknown or another's."""
        sample = self._under_way.get(request_id) or self._paused.get(request_id)
        return sample.session_id if sample is not None and sample.tenant == tenant else None

    def sessions(self) -> set[str]:
        """Those with samples that have not ended."""
        return {sample.session_id for sample in (*self._under_way.values(), *self._paused.values())}

    def pause(self, session_id: str) -> None:
        """Stop a session's samples; they are still promised, and `go_on` draws them anew."""
        stopped = [name for name, sample in self._under_way.items() if sample.session_id == session_id]
        for request_id in stopped:
            self._paused[request_id] = self._under_way[request_id]
            task = self._under_way[request_id].task
            self._pausing.add(task)
            task.add_done_callback(self._pausing.discard)
            self._stop(request_id)
            del self._under_way[request_id]
        if stopped:
            log.info("%d samples of session %s stopped: its client is gone", len(stopped), session_id)

    def go_on(self, session_id: str) -> None:
        """Draw a session's samples that were paused."""
        if not self._paused:
            return
        for request_id, sample in list(self._paused.items()):
            if sample.session_id == session_id:
                del self._paused[request_id]
                self._start(request_id, sample.sampler, sample.request, sample.targets)

    def give_up(self, session_id: str) -> None:
        """The samples that were paused fail: their client has been away for too long."""
        for request_id, sample in list(self._paused.items()):
            if sample.session_id == session_id:
                self._end(request_id, m.Failure(error=_AWAY, category="server"))

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = [sample.task for sample in self._under_way.values()]
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
        is_failure = True
        is_over = True
        try:
            response = await self._generate_or_again(request_id, sampler, request, targets)
            self._futures.complete(request_id, await self._futures.encoded(response))
            self._record(sampler, request, response)
            is_failure = False
        except asyncio.CancelledError:
            if asyncio.current_task() in self._pausing:
                is_over = False
                raise
            stopped = m.Failure(
                error="the sampling engine stopped before the sample was done", category="server"
            )
            self._futures.complete(request_id, stopped)
            raise
        except Exception as error:
            self._futures.complete(request_id, to_failure(error, f"sample {request.seq_id} of {sampler.id}"))
        finally:
            if is_over:
                self._note_end(sampler, request, request_id, is_failure)

    def _record(self, sampler: tables.Sampler, request: m.SampleRequest, response: SampleResponse) -> None:
        tokens = sum(len(sequence.tokens) for sequence in response.sequences)
        self._ledger.record(sampler.tenant, sampler.session_id, "sampling_prefill", request.prompt.length)
        self._ledger.record(sampler.tenant, sampler.session_id, "sampling_sample", tokens)
        self._tokens.charge(sampler.tenant, tokens)

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
                # Not while the adapter's place is held: who writes the checkpoint needs it.
                await self._checkpoints.arrived(uris.parse(sampler.model_path))
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
        checkpoint = await self._checkpoints.find(sampler.tenant, sampler.model_path, "model_path")
        if sampler.checkpoint_time is not None and checkpoint.created_at != sampler.checkpoint_time:
            raise NotFound(
                f"model_path: {sampler.model_path!r} was overwritten since this sampling client was made; "
                "make a new one"
            )
        return await self._checkpoints.read(uris.parse(sampler.model_path))


def _dense(targets: TensorData | SparseTensor) -> Int64Array:
    array = targets.to_numpy(pad_value=-1) if isinstance(targets, SparseTensor) else targets.array
    return array.astype(np.int64, copy=False)


def _in_layout_of(targets: SparseTensor, response: SampleResponse) -> SampleResponse:
    """The log-probabilities of the listed tokens alone, in the order of the list."""
    assert isinstance(response.target_prompt_logprobs, TensorData), "engines answer with dense tensors"
    values = response.target_prompt_logprobs.array[targets.row_indices(), targets.col_indices]
    return replace(response, target_prompt_logprobs=replace(targets, values=values))


def _promise(request_id: str, request: m.SampleRequest) -> m.Promise:
    sequence_ids = [f"{request_id}:{i}" for i in range(request.num_samples)]
    return m.Promise(request_id=request_id, sample_sequence_ids=sequence_ids)
