"""Whether a sampling engine computes an adapter as the trainer does, checked once for each shape of adapters.

An engine that doesn't know the names of an adapter's matrices leaves them out in silence, and samples from the base
model, or from half an adapter. So when a run's adapter is published to an engine that isn't the trainer's own, both
compute the log-probabilities of the same tokens:

    difference   between the two, root mean square over the tokens, in nats
    effect       of the adapter: between the trainer with it and the engine without

If the difference is more than rounding, the publication fails. If it isn't, and the effect is well above rounding, the
shape is proven, and not checked again. A fresh adapter has no effect and proves nothing: its shape is checked again
with each publication until one proves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import Float32Array, Int64Array, SampleResponse, SamplingParams
from twinkle.server.backends.protocol import AdapterState, Row, RowResult
from twinkle.server.samplers.protocol import GenerateRequest

# Nats that rounding makes at most, by the model's dtype: bfloat16's logits of a usual size are whole eighths.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}

# An effect of so many tolerances proves a shape: if one of seven kinds of layers were left out, it would still show.
_PROVING = 4.0

_TOKENS = 33


class Trainer(Protocol):
    """The part of `WorkerPort` that trains."""

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]: ...


class Sampler(Protocol):
    """The part of `WorkerPort` that samples."""

    async def generate(self, request: GenerateRequest) -> SampleResponse: ...


@dataclass(frozen=True)
class AdapterShape:
    """What decides which matrices an engine must know.

    Attributes:
        targets: full names of the layers that the adapter acts on.
    """

    rank: int
    targets: frozenset[str]

    @classmethod
    def of(cls, state: AdapterState) -> AdapterShape:
        return cls(state.spec.rank, frozenset(state.target_modules))


@dataclass
class ProvenShapes:
    """The shapes that an engine is known to compute as the trainer does.

    Attributes:
        torch_dtype: of the base model.
        vocab_size: token ids are below it.
    """

    torch_dtype: str
    vocab_size: int
    _proven: set[AdapterShape] = field(default_factory=set[AdapterShape])

    def has(self, shape: AdapterShape) -> bool:
        return shape in self._proven

    async def check(
        self, shape: AdapterShape, trainer: Trainer, run_id: str, sampler: Sampler, sampler_adapter_id: str
    ) -> None:
        """Check a published adapter if its shape has not been proven.

        Between the publication and this, no step may change the run's adapter.

        Args:
            run_id: the adapter's id in the trainer.
            sampler_adapter_id: the published copy's id in the sampler.

        Raises:
            ServerFault: if the sampler computes something else than the trainer. The copy must not be sampled from.
        """
        if self.has(shape):
            return
        tolerance = TOLERANCE[self.torch_dtype]
        found = await compare(trainer, run_id, sampler, sampler_adapter_id, probe_tokens(self.vocab_size))
        allowed = tolerance * max(1.0, found.effect)
        if not found.difference <= allowed:  # NaN is no agreement
            raise ServerFault(_words(shape, found, allowed))
        if found.effect >= _PROVING * tolerance:
            self._proven.add(shape)


@dataclass(frozen=True)
class Comparison:
    """In nats, root mean square over the tokens: see the module."""

    difference: float
    effect: float
    from_base: float  # between the sampler with the adapter and without


async def compare(
    trainer: Trainer, run_id: str, sampler: Sampler, sampler_adapter_id: str, tokens: Int64Array
) -> Comparison:
    """
    Args:
        tokens: int64 [T], T >= 2.
    """
    trained, sampled, base = await asyncio.gather(
        _trainers(trainer, run_id, tokens),
        _samplers(sampler, sampler_adapter_id, tokens),
        _samplers(sampler, None, tokens),
    )
    return Comparison(_rms(sampled - trained), _rms(trained - base), _rms(sampled - base))


def probe_tokens(vocab_size: int) -> Int64Array:
    """Tokens to compare by, the same for every adapter of a model, int64 [33]."""
    return np.random.default_rng(vocab_size).integers(0, vocab_size, _TOKENS)


async def _trainers(trainer: Trainer, run_id: str, tokens: Int64Array) -> Float32Array:
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
    row = Row(run_id, tokens[:-1], "cross_entropy", inputs, forward_only=True)
    [[result]] = await trainer.forward_backward([[row]])
    return result.logprobs


async def _samplers(sampler: Sampler, adapter_id: str | None, tokens: Int64Array) -> Float32Array:
    params = SamplingParams(max_tokens=1, temperature=0, stop=[])
    # Of no tenant: it is the server that asks.
    request = GenerateRequest("", adapter_id, tokens, params, prompt_logprobs=True)
    logprobs = (await sampler.generate(request)).prompt_logprobs
    assert logprobs is not None
    return np.array(logprobs[1:], np.float32)


def _rms(values: Float32Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _words(shape: AdapterShape, found: Comparison, allowed: float) -> str:
    layers = ", ".join(sorted({name.rpartition(".")[2] for name in shape.targets}))
    whose = ""
    if found.from_base <= allowed:
        whose = ": it computes the base model, without the adapter"
    return (
        f"the sampling engine does not compute adapters of rank {shape.rank} on {layers} as the trainer does{whose} "
        f"(log-probabilities differ by {found.difference:.3g} nats, {allowed:.3g} are allowed; the adapter's effect is "
        f"{found.effect:.3g}). Nothing was published. Let the server sample with sampler.engine: transformers"
    )
