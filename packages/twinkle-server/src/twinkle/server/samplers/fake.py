"""A sampling engine in a few lines, for tests of everything around it: instantaneous, deterministic, no torch.

Token i after a prompt is (sum of the prompt + seed + sample index + i) mod 256, and every log-probability is that of a
fair draw among 256. An adapter's weights change nothing.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future
from typing import Self

from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import SampledSequence, SampleResponse
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
    def create(cls, config: ModelConfig, backend: TrainingBackend) -> Self:
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

    def close(self) -> None:
        with self._lock:
            self._adapters.clear()


def _sample(request: GenerateRequest) -> SampleResponse:
    length = request.params.max_tokens or DEFAULT_MAX_TOKENS
    start = int(request.prompt.sum()) + (request.params.seed or 0)
    sequences = [
        SampledSequence("length", [(start + sample + i) % VOCAB for i in range(length)], [LOGPROB] * length)
        for sample in range(request.num_samples)
    ]
    prompt_logprobs: list[float | None] | None = None
    if request.prompt_logprobs:
        prompt_logprobs = [None, *([LOGPROB] * (len(request.prompt) - 1))]
    return SampleResponse(sequences, prompt_logprobs)
