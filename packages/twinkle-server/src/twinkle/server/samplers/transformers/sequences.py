"""A request on its way through the engine, and the sequences that it is made of."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from twinkle.protocol.types import SampledSequence, SampleResponse, TopkTable
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.draw import Uniforms
from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.network import Prompt
from twinkle.server.samplers.transformers.prompt_scores import (
    PromptAnswers,
    PromptScores,
    asks_about_prompt,
)
from twinkle.server.samplers.transformers.stops import StopRule


@dataclass(eq=False)
class Task:
    """A request that was accepted.

    Attributes:
        adapter: as it was when the request came; removing it from the engine changes nothing here.
        max_tokens: most tokens of a sample.
        seed: the request's, or one drawn for it.
        taken: samples whose prompt is read, or has been.
        admitted: samples that have begun; `finished` holds those that have ended, by their index.
    """

    request: GenerateRequest
    future: Future[SampleResponse]
    adapter: ResidentAdapter | None
    stop: StopRule
    max_tokens: int
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    taken: int = 0
    admitted: int = 0
    finished: dict[int, SampledSequence] = field(default_factory=dict[int, SampledSequence])
    prompt_answers: PromptAnswers = field(default_factory=PromptAnswers)

    @property
    def longest(self) -> int:
        """Tokens that a sample may come to, prompt included."""
        return len(self.request.prompt) + self.max_tokens

    def prompt(self, samples: int) -> Prompt:
        """The prompt for `samples` more samples; what is asked about it is answered with the first ones only."""
        asks = self.taken == 0 and asks_about_prompt(self.request)
        self.taken += samples
        scores = PromptScores(self.request, self.seed) if asks else None
        return Prompt(self.request.tenant, self.request.prompt, self.adapter, samples, scores)

    def prompt_again(self, prompt: Prompt) -> Prompt:
        """One that couldn't be read, to be read from its beginning."""
        return replace(prompt, scores=PromptScores(self.request, self.seed) if prompt.scores else None)

    def note_prompt(self, prompt: Prompt) -> None:
        """Take over what was learnt of the prompt."""
        if prompt.scores is not None:
            self.prompt_answers = prompt.scores.answers()

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == self.request.num_samples

    def succeed(self) -> None:
        """All samples have ended."""
        self.future.set_result(self._response())

    def _response(self) -> SampleResponse:
        answers = self.prompt_answers
        return SampleResponse(
            sequences=[self.finished[i] for i in range(self.request.num_samples)],
            prompt_logprobs=answers.prompt_logprobs,
            topk_prompt_logprobs=answers.topk_prompt_logprobs,
            target_prompt_logprobs=answers.target_prompt_logprobs,
            prompt_alt_tokens=answers.prompt_alt_tokens,
        )

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
    topk: list[TopkTable] = field(default_factory=list[TopkTable])  # a row each

    def result(self, stopped: bool) -> SampledSequence:
        wants_topk = self.task.request.topk_sample_logprobs > 0
        reason = "stop" if stopped else "length"
        return SampledSequence(
            reason, self.tokens, self.logprobs, TopkTable.joined(self.topk) if wants_topk else None
        )
