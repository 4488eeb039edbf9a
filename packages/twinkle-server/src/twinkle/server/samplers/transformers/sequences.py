"""A request on its way through the engine, and the sequences that it is made of."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from dataclasses import dataclass, field

from twinkle.protocol.types import SampledSequence, SampleResponse, TopkRow
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.batches import Prompt
from twinkle.server.samplers.transformers.draw import Uniforms
from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.stops import StopRule


@dataclass(eq=False)
class Task:
    """A request that was accepted.

    Attributes:
        adapter: as it was when the request came; removing it from the engine changes nothing here.
        max_tokens: most tokens of a sample.
        seed: the request's, or one drawn for it.
        admitted: samples that have begun; `finished` holds those that have ended, by their index.
    """

    request: GenerateRequest
    future: Future[SampleResponse]
    adapter: ResidentAdapter | None
    stop: StopRule
    max_tokens: int
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    admitted: int = 0
    finished: dict[int, SampledSequence] = field(default_factory=dict[int, SampledSequence])
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[TopkRow] | None = None

    @property
    def longest(self) -> int:
        """Tokens that a sample may come to, prompt included."""
        return len(self.request.prompt) + self.max_tokens

    def prompt(self, samples: int) -> Prompt:
        """The prompt for `samples` more samples; its log-probabilities are worked out for the first ones only."""
        first = self.admitted == 0
        return Prompt(
            tokens=self.request.prompt,
            adapter=self.adapter,
            rows=samples,
            wants_logprobs=first and self.request.prompt_logprobs,
            k=self.request.topk_prompt_logprobs if first else 0,
        )

    def note_prompt(self, prompt: Prompt) -> None:
        """Take over what was learnt of the prompt. Nothing comes before its first token."""
        if prompt.wants_logprobs:
            self.prompt_logprobs = [None, *prompt.logprobs]
        if prompt.k:
            self.topk_prompt_logprobs = [None, *prompt.topk]

    def finish(self, index: int, sequence: SampledSequence) -> None:
        """A sample has ended; with the last one the future is done."""
        self.finished[index] = sequence
        if len(self.finished) == self.request.num_samples:
            sequences = [self.finished[i] for i in range(self.request.num_samples)]
            response = SampleResponse(sequences, self.prompt_logprobs, self.topk_prompt_logprobs)
            self.future.set_result(response)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False)
class Sequence:
    """One running sample: a row of the batch."""

    task: Task
    index: int
    uniforms: Uniforms
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    topk: list[TopkRow] = field(default_factory=list[TopkRow])

    def result(self, stopped: bool) -> SampledSequence:
        wants_topk = self.task.request.topk_sample_logprobs > 0
        reason = "stop" if stopped else "length"
        return SampledSequence(reason, self.tokens, self.logprobs, self.topk if wants_topk else None)
