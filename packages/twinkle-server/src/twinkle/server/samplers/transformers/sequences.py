"""A request on its way through the engine, and its sequences."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SampledSequence, SampleResponse, TopkTable
from twinkle.server.backends.protocol import BaseModelInfo
from twinkle.server.samplers.prompt_answers import PromptAnswers, asks_about_prompt, check_targets
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.stops import StopRule, stop_rule
from twinkle.server.samplers.transformers.draw import Uniforms
from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.model_runner import Prompt
from twinkle.server.samplers.transformers.prompt_scores import PromptScores
from twinkle.server.samplers.waiting_queue import Waiting


@dataclass(eq=False)
class Task:
    """An accepted request.

    Attributes:
        adapter: as it was when the request arrived; the task keeps it if the engine removes it.
        max_tokens: most tokens of a sample.
        seed: the request's, or one drawn for it.
        number: counts requests in order of arrival.
        has_scores: whether a prefill, complete or not, computes what is requested about the prompt.
        admitted: samples that have begun; `finished` holds those that have ended, by index.
    """

    request: GenerateRequest
    future: Future[SampleResponse]
    adapter: ResidentAdapter | None
    stop: StopRule
    max_tokens: int
    number: int
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    has_scores: bool = False
    admitted: int = 0
    finished: dict[int, SampledSequence] = field(default_factory=dict[int, SampledSequence])
    prompt_answers: PromptAnswers = field(default_factory=PromptAnswers)

    @property
    def longest(self) -> int:
        """Most tokens of a sample, prompt included."""
        return len(self.request.prompt) + self.max_tokens

    def prompt(self, samples: int) -> Prompt:
        """The prompt for `samples` more samples; what is requested about it is computed with the first ones only."""
        asks = not self.has_scores and asks_about_prompt(self.request)
        self.has_scores = True
        scores = PromptScores(self.request, self.seed) if asks else None
        return Prompt(self.request.tenant, self.request.prompt, self.adapter, samples, scores)

    def retry_prompt(self, prompt: Prompt) -> Prompt:
        """A copy of a prompt whose prefill failed, to begin again."""
        return replace(prompt, scores=PromptScores(self.request, self.seed) if prompt.scores else None)

    def take_back(self, prompt: Prompt) -> None:
        """A prompt will be prefilled later instead of now."""
        if prompt.scores is not None:
            self.has_scores = False

    def note_prompt(self, prompt: Prompt) -> None:
        """The prompt is complete: store what was requested about it."""
        if prompt.scores is not None:
            self.prompt_answers = prompt.scores.answers()

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == self.request.num_samples

    def succeed(self) -> None:
        """All samples have ended."""
        answers = self.prompt_answers
        response = SampleResponse(
            sequences=[self.finished[i] for i in range(self.request.num_samples)],
            prompt_logprobs=answers.prompt_logprobs,
            topk_prompt_logprobs=answers.topk_prompt_logprobs,
            target_prompt_logprobs=answers.target_prompt_logprobs,
            prompt_alt_tokens=answers.prompt_alt_tokens,
        )
        self.future.set_result(response)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False)
class Sequence:
    """A sample that has begun: a row of the batch, unless it is preempted.

    After a preemption it goes on as if there had been none: its tokens are recomputed, its uniform numbers continue.
    """

    task: Task
    index: int
    uniforms: Uniforms
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    topk: list[TopkTable] = field(default_factory=list[TopkTable])  # one per row

    @property
    def length(self) -> int:
        """Its tokens in the KV cache after the next decode step."""
        return len(self.task.request.prompt) + len(self.tokens)

    @property
    def order(self) -> tuple[int, int]:
        """Age, the oldest first: see `preemption.Slot`."""
        return self.task.number, self.index

    def recompute_prompt(self) -> Prompt:
        """All its tokens so far, to continue from."""
        request = self.task.request
        tokens = np.concatenate([request.prompt, np.array(self.tokens, np.int64)])
        return Prompt(request.tenant, tokens, self.task.adapter, 1)

    def result(self, stopped: bool) -> SampledSequence:
        wants_topk = self.task.request.topk_sample_logprobs > 0
        reason = "stop" if stopped else "length"
        return SampledSequence(
            reason, self.tokens, self.logprobs, TopkTable.joined(self.topk) if wants_topk else None
        )


def make_task(
    request: GenerateRequest,
    future: Future[SampleResponse],
    adapter: ResidentAdapter | None,
    number: int,
    info: BaseModelInfo,
    max_cached_tokens: int,
    has_tokenizer: bool,
) -> Task:
    """
    Args:
        max_cached_tokens: most tokens of a sequence that the sampler's KV cache holds.

    Raises:
        InvalidRequest: if the request can't be served.
    """
    if adapter is not None and not adapter.is_finite:
        raise InvalidRequest(
            f"adapter_id: {request.adapter_id!r} has weights that are not finite numbers, so its training has "
            "failed; sample a checkpoint from before"
        )
    length, limit = len(request.prompt), info.max_context_length
    if not 1 <= length <= limit:
        raise InvalidRequest(f"prompt: {length} tokens; this model takes 1 to {limit}")
    if length > (limit := min(limit, max_cached_tokens)):
        raise InvalidRequest(
            f"prompt: {length} tokens; the sampler's memory holds {limit} on this machine: shorten the prompt"
        )
    check_targets(request, info.vocab_size)
    # One token can be drawn after a prompt that fills the context: it never goes through the model.
    room = max(1, limit - length)
    task = Task(
        request=request,
        future=future,
        adapter=adapter,
        stop=stop_rule(request.params, info.eos_token_ids, has_tokenizer),
        max_tokens=min(request.params.max_tokens or room, room),
        number=number,
    )
    if request.params.seed is not None:
        task.seed = request.params.seed
    return task


# What waits for slots, or is prefilled: a request with samples that have not begun, or a preempted sample.
Item: TypeAlias = Task | Sequence


def task_of(item: Item) -> Task:
    return item.task if isinstance(item, Sequence) else item


def prompt_of(item: Item, samples: int) -> Prompt:
    """What to prefill for this many samples of an item."""
    return item.recompute_prompt() if isinstance(item, Sequence) else item.prompt(samples)


def waiting(item: Item, samples: int) -> Waiting[Item]:
    """This many samples of an item, to wait for slots; a preempted one has already been charged."""
    request = task_of(item).request
    if isinstance(item, Sequence):
        return Waiting(request.tenant, item, 0, item.length, samples)
    return Waiting(request.tenant, item, item.longest, len(request.prompt), samples)
