"""A sampling engine in a few lines, for tests of everything around it: instantaneous, deterministic, no torch.

Token i after a prompt is (sum of the prompt + seed + sample index + i) mod 256, and every log-probability is that of a
fair draw among 256, the likeliest of which are 0, 1, 2, ... The j-th alternative to prompt token i + 1 is (sum of the
prompt + seed + i + j) mod 256, and 0 at temperature 0. An adapter's weights change nothing.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from typing import Self

import numpy as np

from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import PromptAltTokens, SampledSequence, SampleResponse, TensorData, TopkTable
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend
from twinkle.server.samplers.protocol import GenerateRequest

VOCAB = 256
LOGPROB = -math.log(VOCAB)
DEFAULT_MAX_TOKENS = 16


class FakeEngine:
    """See `twinkle.server.samplers.protocol.SamplingEngine`."""

    def __init__(self) -> None:
        self._adapters: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def create(cls, config: ModelConfig, backend: TrainingBackend | None) -> Self:
        return cls()

    def resident_adapters(self) -> list[str]:
        with self._lock:
            return sorted(self._adapters)

    def add_adapter(self, adapter_id: str, state: AdapterState) -> None:
        with self._lock:
            self._adapters.add(adapter_id)

    def remove_adapter(self, adapter_id: str) -> None:
        with self._lock:
            self._adapters.discard(adapter_id)

    def generate(self, request: GenerateRequest) -> Future[SampleResponse]:
        future: Future[SampleResponse] = Future()
        with self._lock:
            known = request.adapter_id is None or request.adapter_id in self._adapters
        if known:
            future.set_result(_sample(request))
        else:
            future.set_exception(NotFound(f"adapter_id: {request.adapter_id!r} is not resident"))
        return future

    def cancel(self, request_id: str) -> None:
        """Nothing: every request has been answered."""

    def close(self) -> None:
        with self._lock:
            self._adapters.clear()


def _sample(request: GenerateRequest) -> SampleResponse:
    length = request.params.max_tokens or DEFAULT_MAX_TOKENS
    start = int(request.prompt.sum()) + (request.params.seed or 0)
    sequences = [
        SampledSequence(
            stop_reason="length",
            tokens=[(start + sample + i) % VOCAB for i in range(length)],
            logprobs=[LOGPROB] * length,
            topk_logprobs=_topk(0, length, request.topk_sample_logprobs),
        )
        for sample in range(request.num_samples)
    ]
    rows = len(request.prompt) - 1
    last_n = request.prompt_logprobs_last_n
    listed = rows if last_n is None else min(last_n, rows)
    unlisted = [None] * (rows + 1 - listed)
    return SampleResponse(
        sequences,
        prompt_logprobs=[*unlisted, *([LOGPROB] * listed)] if request.prompt_logprobs else None,
        topk_prompt_logprobs=_topk(len(unlisted), listed, request.topk_prompt_logprobs),
        target_prompt_logprobs=_target_logprobs(request),
        prompt_alt_tokens=_alternatives(request, start) if request.prompt_alt_tokens_k else None,
    )


def _topk(unlisted: int, listed: int, k: int) -> TopkTable | None:
    if not k:
        return None
    table = TopkTable.empty(unlisted + listed, k)
    table.token_ids[unlisted:], table.logprobs[unlisted:] = np.arange(k), LOGPROB
    return table


def _target_logprobs(request: GenerateRequest) -> TensorData | None:
    if request.target_tokens is None:
        return None
    return TensorData(np.where(request.target_tokens < 0, 0.0, LOGPROB).astype(np.float32))


def _alternatives(request: GenerateRequest, start: int) -> PromptAltTokens:
    shape = (len(request.prompt) - 1, request.prompt_alt_tokens_k)
    drawn = (start + np.arange(shape[0])[:, None] + np.arange(shape[1])) % VOCAB
    tokens = np.zeros(shape, np.int64) if request.params.temperature == 0 else drawn
    return PromptAltTokens(TensorData(tokens), TensorData(np.full(shape, LOGPROB, np.float32)))
