"""The interface of a sampling engine: adapters by id, requests in, futures out; how to batch them is up to the engine.

Engines are found by entry points (group `twinkle.sampling_engines`). An engine runs in its own thread (or process); its
methods may be called from any thread and return at once.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, Self

from twinkle.protocol.types import Int64Array, SampleResponse, SamplingParams
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """One prompt, `num_samples` continuations.

    Attributes:
        tenant: waiting requests are served fairly between tenants.
        adapter_id: a resident adapter, or None for the base model.
        prompt: int64 [T], T >= 1.
        prompt_logprobs: whether to return the log-probabilities of the prompt's tokens too, under the plain
            distribution (temperature 1); the first entry is None.
        topk_prompt_logprobs, topk_sample_logprobs: how many of the likeliest tokens to list at each position.
        prompt_logprobs_last_n: score only this many of the last prompt tokens (and list their likeliest); None: all.
            The entries before them are None.
        target_tokens: int64 [T - 1, K]; row i is scored at prompt position i + 1, under the plain distribution; -1
            scores
            nothing: the response's `target_prompt_logprobs` is dense float32 [T - 1, K], 0 there.
        prompt_alt_tokens_k: how many tokens to draw at each prompt position after the first, independently, at the
            request's temperature (0: all are the likeliest) and from its seed; top_k and top_p don't apply. Their
            log-probabilities are those of the plain distribution.
        request_id: for `cancel`.
    """

    tenant: str
    adapter_id: str | None
    prompt: Int64Array
    params: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_tokens: Int64Array | None = None
    prompt_alt_tokens_k: int = 0
    request_id: str = ""


class EngineDied(RuntimeError):
    """An engine's own process has ended: no request can be served until another engine is made."""


class SamplingEngine(Protocol):
    """One base model, many resident adapters, one running batch."""

    @classmethod
    def create(cls, config: ModelConfig, backend: TrainingBackend | None) -> Self:
        """An engine for the base model of `config`.

        Args:
            backend: trains in the same process; its weights are shared if possible. None where nothing does: then
                `config`'s parallel sizes are the engine's own.
        """
        ...

    def add_adapter(self, adapter_id: str, state: AdapterState) -> None:
        """Make an adapter resident: an immutable copy of `state.weights`. Adding the same id again changes nothing."""
        ...

    def remove_adapter(self, adapter_id: str) -> None:
        """Remove an adapter once the requests that use it are done."""
        ...

    def generate(self, request: GenerateRequest) -> Future[SampleResponse]:
        """Queue a request. If it fails (unknown adapter, not enough memory), only its own future does.

        However many there are, none fails for lack of room: they wait, and one tenant's don't keep out another's.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Cancel a request's future, and free its slots soon. Unknown ids and finished requests are ignored."""
        ...

    def close(self) -> None:
        """Stop the engine; unfinished futures are cancelled."""
        ...
