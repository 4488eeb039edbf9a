"""Sampling sessions and samples."""

from typing import Literal

from pydantic import Field

from twinkle.protocol.messages.base import Number
from twinkle.protocol.types import JsonTensor, ModelInput, SamplingParams, Value


class CreateSamplingSessionRequest(Value):
    session_id: str
    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class CreateSamplingSessionResponse(Value):
    sampling_session_id: str


class JoinSamplingSessionRequest(Value):
    """One more client of a sampling session, with sequence ids of its own."""

    sampling_session_id: str


class JoinSamplingSessionResponse(Value):
    """`client_counter` is 1 for the first that joins; the client that made the session is 0."""

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class SampleRequest(Value):
    """Continue a prompt, and score it.

    Attributes:
        target_prompt_logprobs: token ids to score, int64 [len(prompt) - 1, K]; row i is scored at prompt position
            i + 1, and -1 asks for nothing.
        prompt_alt_tokens_k: how many alternatives to draw at each prompt position after the first.
        prompt_logprobs_last_n: score only the last so many tokens of the prompt.
        record_stability_info: for stable_reinforce, which no server of ours has: refused if true.
    """

    sampling_session_id: str
    seq_id: Number
    prompt: ModelInput
    num_samples: int = Field(default=1, ge=1)
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    target_prompt_logprobs: JsonTensor | None = None
    prompt_alt_tokens_k: int = Field(default=0, ge=0)
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    record_stability_info: bool = False


class GetSampler(Value):
    sampler_id: str


class SamplerInfo(Value):
    sampler_id: str
    base_model: str
    model_path: str | None = None
