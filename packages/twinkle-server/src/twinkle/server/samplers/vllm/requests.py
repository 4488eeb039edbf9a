"""A request on its way through vLLM, sample by sample: its parameters in vLLM's words, and what comes back."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SampledSequence, SampleResponse, TopkTable
from twinkle.server.samplers.prompt_answers import PromptAnswers, asks_about_prompt, check_targets
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.stops import StopRule, is_stopped, stop_rule
from twinkle.server.samplers.vllm import prompts
from twinkle.server.samplers.vllm.api import VllmApi
from twinkle.server.samplers.vllm.served import ServedModel

# vLLM's range. Lower ones are raised to the lowest, which is as good as greedy unless tokens are about equally likely.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that vLLM knows.

    Attributes:
        number: vLLM's id; never used twice.
        request: vLLM's `LoRARequest`; None for one whose weights are not finite, which vLLM has not been given.
        users: requests that are not done.
        is_removed: goes as soon as there are no users.
    """

    number: int
    request: Any
    users: int = 0
    is_removed: bool = False


@dataclass(eq=False)
class Task:
    """An accepted request.

    Attributes:
        max_tokens: most tokens of a sample.
        seed: the request's, or one drawn for it.
        begun: samples that vLLM has been given; `finished` holds those that have ended, by index.
    """

    request: GenerateRequest
    future: Future[SampleResponse]
    adapter: LoadedAdapter | None
    stop: StopRule
    max_tokens: int
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    begun: int = 0
    finished: dict[int, SampledSequence] = field(default_factory=dict[int, SampledSequence])
    answers: PromptAnswers = field(default_factory=PromptAnswers)

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def adapter_number(self) -> int | None:
        return None if self.adapter is None else self.adapter.number

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def longest(self) -> int:
        return self.prompt_length + self.max_tokens

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == self.request.num_samples

    def succeed(self) -> None:
        """All samples have ended."""
        response = SampleResponse(
            sequences=[self.finished[i] for i in range(self.request.num_samples)],
            prompt_logprobs=self.answers.prompt_logprobs,
            topk_prompt_logprobs=self.answers.topk_prompt_logprobs,
            target_prompt_logprobs=self.answers.target_prompt_logprobs,
            prompt_alt_tokens=self.answers.prompt_alt_tokens,
        )
        self.future.set_result(response)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def make_task(
    request: GenerateRequest,
    future: Future[SampleResponse],
    adapter: LoadedAdapter | None,
    model: ServedModel,
    has_tokenizer: bool,
    scores_tokens: bool,
) -> Task:
    """
    Args:
        scores_tokens: see `prompts.questions`.

    Raises:
        InvalidRequest: if the request can't be served.
    """
    if adapter is not None and adapter.request is None:
        raise InvalidRequest(
            f"adapter_id: {request.adapter_id!r} has weights that are not finite numbers, so its training has "
            "failed; sample a checkpoint from before"
        )
    length, limit = len(request.prompt), model.max_context_length
    if not 1 <= length <= limit:
        raise InvalidRequest(f"prompt: {length} tokens; this model takes 1 to {limit}")
    if request.params.temperature > _MAX_TEMPERATURE:
        raise InvalidRequest(
            f"sampling_params.temperature: {request.params.temperature:g}; the vllm engine takes up to "
            f"{_MAX_TEMPERATURE:g}"
        )
    check_targets(request, model.vocab_size)
    prompts.check(request, model.vocab_size, scores_tokens)
    # One token can be drawn after a prompt that fills the context: it never goes through the model.
    room = max(1, limit - length)
    task = Task(
        request=request,
        future=future,
        adapter=adapter,
        stop=stop_rule(request.params, model.eos_token_ids, has_tokenizer),
        max_tokens=min(request.params.max_tokens or room, room),
    )
    if request.params.seed is not None:
        task.seed = request.params.seed
    return task


def sampling_params(api: VllmApi, task: Task, index: int, scores_tokens: bool, vocab_size: int) -> Any:
    """VLLM's parameters of one sample; the first one asks about the prompt too."""
    given, request = task.request.params, task.request
    is_greedy = given.temperature == 0
    asked = index == 0 and asks_about_prompt(request)
    kinds = api.RequestOutputKind
    return api.SamplingParams(
        max_tokens=task.max_tokens,
        temperature=0.0 if is_greedy else max(given.temperature, _MIN_TEMPERATURE),
        top_k=given.top_k if not is_greedy and 0 < given.top_k < vocab_size else 0,
        top_p=1.0 if is_greedy else given.top_p,
        # Of a sample without a seed vLLM draws many rows at once, which is faster.
        seed=None if is_greedy or given.seed is None else _seed(given.seed, index),
        stop_token_ids=sorted(task.stop.tokens),
        ignore_eos=True,
        detokenize=False,
        logprobs=request.topk_sample_logprobs,
        flat_logprobs=True,
        output_kind=kinds.DELTA if task.stop.strings else kinds.FINAL_ONLY,
        **(prompts.questions(request, scores_tokens) if asked else {}),
    )


def _seed(seed: int, index: int) -> int:
    """Of a sample: a function of the request's seed and the sample's index alone."""
    return int(np.random.SeedSequence((seed % 2**64, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Collected:
    """What has come of one sample."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._topk_ids: list[list[int]] = []
        self._topk_logprobs: list[list[float]] = []

    def add(self, completion: Any, tokenizer: Tokenizer | None) -> SampledSequence | None:
        """Add vLLM's `CompletionOutput`; returns the sample if it has ended."""
        table, k = completion.logprobs, self._task.request.topk_sample_logprobs
        for row, token in enumerate(completion.token_ids):
            first = table.start_indices[row]
            self._tokens.append(int(token))
            self._logprobs.append(table.logprobs[first])  # the sampled token precedes the likeliest
            if k:
                self._topk_ids.append(table.token_ids[first + 1 : first + 1 + k])
                self._topk_logprobs.append(table.logprobs[first + 1 : first + 1 + k])
            # Every token of a text with stop strings: several may come at once.
            if self._task.stop.strings and self._is_stopped(tokenizer):
                return self._result("stop")
        if completion.finish_reason is None:
            return None
        return self._result(completion.finish_reason)

    def _is_stopped(self, tokenizer: Tokenizer | None) -> bool:
        return is_stopped(self._task.stop, self._tokens, tokenizer, self._task.request.prompt)

    def _result(self, reason: Any) -> SampledSequence:
        topk = None
        if k := self._task.request.topk_sample_logprobs:
            shape = (len(self._tokens), k)
            topk = TopkTable(
                np.array(self._topk_ids, np.int32).reshape(shape),
                np.array(self._topk_logprobs, np.float32).reshape(shape),
            )
        return SampledSequence("stop" if reason == "stop" else "length", self._tokens, self._logprobs, topk)
