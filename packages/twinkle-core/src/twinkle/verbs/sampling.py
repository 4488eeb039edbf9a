"""The sampling client: samples from a base model, or from a checkpoint of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

from twinkle.protocol import messages as m
from twinkle.protocol.types import JsonTensor, ModelInput, SampleResponse, SamplingParams, TensorData, make
from twinkle.verbs.channel import Channel
from twinkle.verbs.forks import first_number_elsewhere
from twinkle.verbs.futures import Pending, wait


class SamplingClient:
    """Samples from fixed weights. Created by `ServiceClient.create_sampling_client` and
    `TrainingClient.save_weights_and_get_sampling_client`.

    Every verb returns a `Pending` at once; samples in flight together are generated together. A client of a server can
    be pickled, API key included: the copy samples from the same weights, in any process.
    """

    def __init__(self, channel: Channel, sampling_session_id: str, first_number: int = 0) -> None:
        """
        Args:
            first_number: the first sequence id; no two clients of a sampling session may use the same ids.
        """
        self._channel = channel
        self._seq_ids = itertools.count(first_number)
        self._process = os.getpid()
        self.sampling_session_id = sampling_session_id
        """The sampler's id on the server."""

    def sample(
        self,
        prompt: ModelInput | Sequence[int],
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: object = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Pending[SampleResponse]:
        """Continue `prompt`.

        Args:
            prompt: a ModelInput, or token ids.
            num_samples: how many continuations.
            sampling_params: temperature, top_k, top_p, seed, stop, max_tokens.
            include_prompt_logprobs: also return the log-probability of each prompt token (None for the first).
            topk_prompt_logprobs, topk_sample_logprobs: also return the k most likely tokens at each position.
            target_prompt_logprobs: token ids to score, an integer array [len(prompt) - 1, K]; row i is scored at prompt
                position i + 1, and -1 asks for nothing.
            prompt_alt_tokens_k: sample k alternatives to each prompt token after the first.
            prompt_logprobs_last_n: score only this many tokens, at the end of the prompt.

        Returns:
            `sequences`, `num_samples` of them, each with `tokens`, `logprobs` and `stop_reason`.
        """
        if self._process != os.getpid():  # forked: the parent keeps using the ids that follow
            self._process, self._seq_ids = os.getpid(), itertools.count(first_number_elsewhere())
        request = make(
            m.SampleRequest,
            sampling_session_id=self.sampling_session_id,
            seq_id=next(self._seq_ids),
            prompt=prompt if isinstance(prompt, ModelInput) else ModelInput.from_ints(prompt),
            num_samples=num_samples,
            sampling_params=sampling_params or SamplingParams(),
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=None
            if target_prompt_logprobs is None
            else _json_tensor(target_prompt_logprobs),
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return Pending(cast(Future[SampleResponse], self._channel.submit(request)), "sample")

    def compute_logprobs(self, prompt: ModelInput | Sequence[int]) -> Pending[list[float | None]]:
        """Log-probability of each token of `prompt` under the untempered model; None for the first."""
        sampled = self.sample(prompt, 1, SamplingParams(max_tokens=1), include_prompt_logprobs=True)
        return sampled.then(lambda response: response.prompt_logprobs or [])

    def __reduce__(self) -> tuple[Any, ...]:
        return _client_elsewhere, (self._channel, self.sampling_session_id)

    def get_base_model(self) -> str:
        reply = self._channel.ask(m.GetSampler(sampler_id=self.sampling_session_id))
        return wait(reply, "get_base_model").base_model


def _client_elsewhere(channel: Channel, sampling_session_id: str) -> SamplingClient:
    return SamplingClient(channel, sampling_session_id, first_number_elsewhere())


def _json_tensor(values: object) -> JsonTensor:
    tensor = values if isinstance(values, TensorData) else TensorData.from_numpy(values)
    return JsonTensor(data=tensor.data, dtype=tensor.dtype, shape=tensor.shape)
