"""Decoding with many adapters, beside what the memory's bandwidth allows; and the hand-over of new weights."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from on_gpu.device import Ceiling
from on_gpu.models import synchronize
from on_gpu.reckoning import Work
from on_gpu.report import Part, Report
from on_gpu.training import Trainer, adapter_name
from twinkle.protocol.types import SamplingParams
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

# Prompts of a measurement; each has its share of the sequences.
_PROMPTS = 8
MOST_ADAPTERS = 8
_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Lengths:
    """
    Attributes:
        prompt: tokens of each prompt.
        short, long: tokens that two runs generate: what the long one has more is counted, and so no prompt.
    """

    prompt: int
    short: int
    long: int


LENGTHS = Lengths(prompt=512, short=8, long=104)
TOY_LENGTHS = Lengths(prompt=16, short=2, long=10)


class Sampler:
    """An engine, with adapters of the trainer beside it."""

    def __init__(self, engine: TransformersEngine, trainer: Trainer, work: Work, ceiling: Ceiling) -> None:
        self._engine = engine
        self._trainer = trainer
        self._work = work
        self._ceiling = ceiling
        self._draw = np.random.default_rng(0)

    def decode(self, report: Report, part: Part, sequences: int, adapters: int, lengths: Lengths) -> None:
        """A line: tokens a second of so many sequences that decode together, and the roofline."""
        self._trainer.need_adapters(adapters)
        names = [adapter_name(i) for i in range(adapters)]
        for name in names:
            self._engine.add_adapter(name, self._trainer.backend.export_adapter(name, with_optimizer=False))
        self._run(sequences, names, lengths.prompt, lengths.short)  # finds kernels, takes memory
        short = self._run(sequences, names, lengths.prompt, lengths.short)
        long = self._run(sequences, names, lengths.prompt, lengths.long)
        steps = lengths.long - lengths.short
        step = (long - short) / steps
        context = lengths.prompt + (lengths.short + lengths.long) / 2
        moved = self._work.decode_bytes(sequences, context, adapters, self._trainer.adapter_numbers)
        peak = self._ceiling.peak
        bandwidth = self._ceiling.bandwidth if peak is None else peak.bandwidth
        row = {
            "sequences": sequences,
            "adapters": adapters,
            "tokens/s": sequences / step,
            "step, ms": 1000 * step,
            "roofline, tokens/s": sequences * bandwidth / moved,
            "of roofline": moved / bandwidth / step,
            "GB a step": moved / 1e9,
            "mean context": context,
            f"prompts and {lengths.short} tokens, s": short,
        }
        report.add(part, row)
        if step <= 0:
            part.problems.append(f"{sequences} sequences: the longer run took no longer than the shorter one")

    def _run(self, sequences: int, adapters: list[str], prompt: int, tokens: int) -> float:
        """Seconds until all sequences have so many tokens. The prompts are new: no cache knows them."""
        params = SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
        prompts = [self._prompt(prompt) for _ in range(_PROMPTS)]
        began = time.perf_counter()
        futures = [
            self._engine.generate(
                GenerateRequest(
                    "tenant",
                    adapters[i % len(adapters)],
                    tokens_of,
                    params,
                    num_samples=sequences // _PROMPTS,
                )
            )
            for i, tokens_of in enumerate(prompts)
        ]
        answers = [future.result(timeout=_TIMEOUT_SECONDS) for future in futures]
        seconds = time.perf_counter() - began
        assert all(len(sample.tokens) == tokens for answer in answers for sample in answer.sequences)
        return seconds

    def _prompt(self, length: int) -> np.ndarray:
        return self._draw.integers(0, self._trainer.backend.info.vocab_size, length)

    def hand_over(self, report: Report, part: Part, times: int) -> None:
        """A line: what it takes until the sampler, doing nothing else, has a token of the trainer's new weights."""
        self._trainer.need_adapters(1)
        params = SamplingParams(max_tokens=1, temperature=1.0, stop=[])
        exports: list[float] = []
        adds: list[float] = []
        tokens: list[float] = []
        size = 0
        for i in range(times):
            synchronize(self._trainer.backend.loaded.device)
            began = time.perf_counter()
            state = self._trainer.backend.export_adapter(adapter_name(0), with_optimizer=False)
            exported = time.perf_counter()
            self._engine.add_adapter(f"version-{i}", state)
            added = time.perf_counter()
            request = GenerateRequest("tenant", f"version-{i}", self._prompt(16), params)
            self._engine.generate(request).result(timeout=_TIMEOUT_SECONDS)
            tokens.append(time.perf_counter() - added)
            adds.append(added - exported)
            exports.append(exported - began)
            size = state.nbytes
            self._engine.remove_adapter(f"version-{i}")
        row = {
            "adapter, MB": size / 1e6,
            "export, ms": 1000 * statistics.median(exports),
            "add, ms": 1000 * statistics.median(adds),
            "first token, ms": 1000 * statistics.median(tokens),
        }
        report.add(part, row)
