"""Runs samples: loads each one's adapter into the sampler, generates, and completes its future.

Samples have no order among them; the sampling engine batches those of all tenants and is fair between tenants.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.codec import Encoded
from twinkle.protocol.errors import Conflict, NotFound
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

# How many accepted samples are remembered, to recognize retries by (sampling session, seq_id).
MAX_REMEMBERED = 65_536

# The sequence ids of the n-th client that joined a sampling session begin at n times this.
IDS_OF_A_CLIENT = 1_000_000_000


_AWAY = (
    "the sample was stopped: its client sent no heartbeat and asked for nothing for a quarter of an hour; send the "
    "request again"
)


@dataclass(eq=False)
class _Sample:
    """A sample that was accepted and has not ended.

    Attributes:
        targets: the request's `target_prompt_logprobs`, decoded and checked.
        task: draws it; None while the sample is paused.
    """

    request_id: str
    sampler: tables.SamplingSession
    request: m.SampleRequest
    targets: TensorData | SparseTensor | None
    task: asyncio.Task[bool] | None = None


class SampleRunner:
    """Accepts samples and runs each to its end. Single-threaded: called on one event loop."""

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
            tokens: rate limit charged for sampled tokens.
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
        self._samples: dict[str, _Sample] = {}  # by request id
        self._paused: set[str] = set()  # sessions
        # The event loop holds only weak references to tasks.
        self._stopping: set[asyncio.Task[bool] | asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._samples)

    def first_of(self, request: m.SampleRequest, digest: bytes) -> m.Promise | None:
        """The promise of the first request with the same (sampling session, seq_id), if there was one.

        Raises:
            Conflict: if that one had other content.
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
        sampler: tables.SamplingSession,
        request: m.SampleRequest,
        request_id: str,
        digest: bytes,
        targets: TensorData | SparseTensor | None = None,
    ) -> m.Promise:
        """Begin a sample whose future exists.

        Args:
            digest: of the request; empty if it is never retried.
            targets: see `_Sample`.
        """
        self._remember(request, request_id, digest)
        sample = self._samples[request_id] = _Sample(request_id, sampler, request, targets)
        self._start(sample)
        return _promise(request_id, request)

    def _start(self, sample: _Sample) -> None:
        sample.task = asyncio.create_task(self._run(sample))
        # Not at the end of `_run`: a task that is cancelled before its first step never enters it.
        sample.task.add_done_callback(lambda task: self._ended(sample, task))

    def _ended(self, sample: _Sample, task: asyncio.Task[bool]) -> None:
        if sample.task is not task:
            return  # it was paused, and is still promised
        del self._samples[sample.request_id]
        if task.cancelled():
            error = "the sampling engine stopped before the sample was done"
            self._futures.complete(sample.request_id, m.Failure(error=error, category="server"))
        has_failed = task.cancelled() or task.exception() is not None or not task.result()
        self._note_end(sample.sampler, sample.request, sample.request_id, has_failed)

    def restore(
        self,
        sampler: tables.SamplingSession,
        request: m.SampleRequest,
        request_id: str,
        digest: bytes,
        outcome: Encoded,
    ) -> m.Promise:
        """Restore a sample that an earlier process has drawn."""
        self._remember(request, request_id, digest)
        self._note_end(sampler, request, request_id, is_failure=outcome.kind == m.Failure.__name__)
        return _promise(request_id, request)

    def _remember(self, request: m.SampleRequest, request_id: str, digest: bytes) -> None:
        self._accepted[request.sampling_session_id, request.seq_id] = request_id, digest
        if len(self._accepted) > MAX_REMEMBERED:
            self._accepted.popitem(last=False)

    def _note_end(
        self, sampler: tables.SamplingSession, request: m.SampleRequest, request_id: str, is_failure: bool
    ) -> None:
        target = (sampler.id, request.seq_id // IDS_OF_A_CLIENT)
        state: Literal["finished", "failed"] = "failed" if is_failure else "finished"
        self._completions.add(target, m.Completion(state=state, request_id=request_id))

    def cancel(self, tenant: str, request_id: str) -> None:
        """Stop a sample that nobody waits for; one that has ended, is unknown or another tenant's is left as it is."""
        sample = self._samples.get(request_id)
        if sample is not None and sample.sampler.tenant == tenant:
            self._end(sample, m.Failure(error="the sample was cancelled by its client", category="user"))

    def _end(self, sample: _Sample, failure: m.Failure) -> None:
        self._futures.complete(sample.request_id, failure)
        if sample.task is None:
            del self._samples[sample.request_id]
            self._note_end(sample.sampler, sample.request, sample.request_id, is_failure=True)
        else:
            self._stop(sample.request_id, sample.task)

    def _stop(self, request_id: str, task: asyncio.Task[bool]) -> None:
        """Stop drawing a sample."""
        task.cancel()
        for stopping in (task, asyncio.create_task(self._worker.cancel(request_id))):
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)

    def cancel_all(self, session_id: str) -> None:
        """Stop all samples of a session: nobody waits for them any more."""
        self._paused.discard(session_id)
        for sample in self._of(session_id):
            self.cancel(sample.sampler.tenant, sample.request_id)

    def _of(self, session_id: str) -> list[_Sample]:
        return [sample for sample in self._samples.values() if sample.sampler.session_id == session_id]

    # ------------------------------------------------------------ clients that are away

    def sessions(self) -> set[str]:
        """The sessions with samples that have not ended."""
        return {sample.sampler.session_id for sample in self._samples.values()}

    def pause(self, session_id: str) -> None:
        """Stop a session's samples; they are still promised, and `resume` draws them from the beginning."""
        drawn = [
            (one, one.task) for one in self._of(session_id) if one.task is not None and not one.task.done()
        ]
        for sample, task in drawn:
            sample.task = None
            self._stop(sample.request_id, task)
        if drawn:
            self._paused.add(session_id)
            log.info("%d samples of session %s stopped: its client is gone", len(drawn), session_id)

    def resume(self, session_id: str) -> None:
        """Draw a session's paused samples."""
        if session_id not in self._paused:
            return
        self._paused.remove(session_id)
        for sample in self._of(session_id):
            if sample.task is None:
                self._start(sample)

    def give_up(self, session_id: str) -> None:
        """Fail a session's paused samples: their client has been away for too long."""
        self._paused.discard(session_id)
        for sample in self._of(session_id):
            if sample.task is None:
                self._end(sample, m.Failure(error=_AWAY, category="server"))

    async def close(self) -> None:
        """Cancel all running samples."""
        tasks = [sample.task for sample in self._samples.values() if sample.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._stopping, return_exceptions=True)

    async def _run(self, sample: _Sample) -> bool:
        """Draw a sample and complete its future; returns whether it succeeded."""
        try:
            response = await self._generate_or_again(sample)
            self._futures.complete(sample.request_id, await self._futures.encoded(response))
            self._record(sample.sampler, sample.request, response)
        except Exception as error:
            what = f"sample {sample.request.seq_id} of {sample.sampler.id}"
            self._futures.complete(sample.request_id, to_failure(error, what))
            return False
        return True

    def _record(
        self, sampler: tables.SamplingSession, request: m.SampleRequest, response: SampleResponse
    ) -> None:
        tokens = sum(len(sequence.tokens) for sequence in response.sequences)
        self._ledger.record(
            sampler.tenant, sampler.session_id, "sampling_prefill", len(request.prompt.tokens)
        )
        self._ledger.record(sampler.tenant, sampler.session_id, "sampling_sample", tokens)
        self._tokens.charge(sampler.tenant, tokens)

    async def _generate_or_again(self, sample: _Sample) -> SampleResponse:
        """Draw a sample, once more if the worker was lost: samples change nothing, and the client never notices.

        Only once: the sample itself may be what ended the process.
        """
        try:
            return await self._generate(sample)
        except WorkerLost:
            await self._worker.available()
            return await self._generate(sample)

    async def _generate(self, sample: _Sample) -> SampleResponse:
        sampler, targets = sample.sampler, sample.targets
        if sampler.model_path is None:
            response = await self._worker.generate(_generate_request(sample, None))
        else:
            # Before the adapter is held in place: the job that writes the checkpoint needs it.
            await self._checkpoints.arrived(sampler.model_path)
            # A checkpoint that was overwritten since is not this sampler's adapter.
            made = f"@{sampler.checkpoint_time}" if sampler.checkpoint_time else ""
            key = f"{sampler.model_path}{made}"
            async with self._sampler_adapters.use(key, lambda: self._read(sampler)) as adapter_id:
                response = await self._worker.generate(_generate_request(sample, adapter_id))
        return _in_layout_of(targets, response) if isinstance(targets, SparseTensor) else response

    async def _read(self, sampler: tables.SamplingSession) -> AdapterState:
        assert sampler.model_path is not None, "a base model's sampler has nothing to read"
        checkpoint = await self._checkpoints.find(sampler.tenant, sampler.model_path, "model_path")
        if sampler.checkpoint_time is not None and checkpoint.created_at != sampler.checkpoint_time:
            raise NotFound(
                f"model_path: {sampler.model_path!r} was overwritten since this sampling client was made; "
                "make a new one"
            )
        return await self._checkpoints.read(uris.parse(sampler.model_path))


def _generate_request(sample: _Sample, adapter_id: str | None) -> GenerateRequest:
    request, targets = sample.request, sample.targets
    return GenerateRequest(
        tenant=sample.sampler.tenant,
        adapter_id=adapter_id,
        prompt=request.prompt.tokens.astype(np.int64),
        params=request.sampling_params,
        num_samples=request.num_samples,
        prompt_logprobs=request.prompt_logprobs,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        target_tokens=None if targets is None else _dense(targets),
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        request_id=sample.request_id,
    )


def _dense(targets: TensorData | SparseTensor) -> Int64Array:
    array = targets.to_numpy(pad_value=-1) if isinstance(targets, SparseTensor) else targets.array
    return array.astype(np.int64, copy=False)


def _in_layout_of(targets: SparseTensor, response: SampleResponse) -> SampleResponse:
    """The log-probabilities of the listed tokens alone, in the list's order."""
    assert isinstance(response.target_prompt_logprobs, TensorData), "engines answer with dense tensors"
    values = response.target_prompt_logprobs.array[targets.row_indices(), targets.col_indices]
    return replace(response, target_prompt_logprobs=replace(targets, values=values))


def _promise(request_id: str, request: m.SampleRequest) -> m.Promise:
    sequence_ids = [f"{request_id}:{i}" for i in range(request.num_samples)]
    return m.Promise(request_id=request_id, sample_sequence_ids=sequence_ids)
