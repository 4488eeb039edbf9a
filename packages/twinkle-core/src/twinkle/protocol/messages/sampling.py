"""Sampling sessions and samples."""

from typing import Literal

from pydantic import Field

from twinkle.protocol.messages.base import Number, Query
from twinkle.protocol.types import JsonTensor, ModelInput, SamplingParams, Value


class CreateSamplingSessionResponse(Value):
    sampling_session_id: str


class CreateSamplingSessionRequest(
    Query[CreateSamplingSessionResponse], method="POST", path="/create_sampling_session"
):
    """Client to service: sample from a checkpoint (`model_path`), or from the base model alone."""

    session_id: str
    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSessionResponse(Value):
    """Service to SDK.

    Attributes:
        client_counter: 1 for the first client that joins; the one that made the session is 0.
    """

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class JoinSamplingSessionRequest(
    Query[JoinSamplingSessionResponse], method="POST", path="/join_sampling_session"
):
    """SDK to service: one more client, in another process, with sequence ids of its own."""

    sampling_session_id: str


class SampleRequest(Value):
    """Client to sampling engine: continue a prompt, or score it. The result is `types.SampleResponse`.

    Attributes:
        target_prompt_logprobs: token ids to score, int64 [len(prompt) - 1, K]; row i is scored at prompt position
            i + 1, and -1 asks for nothing.
        prompt_alt_tokens_k: how many alternatives to draw at each prompt position after the first.
        prompt_logprobs_last_n: score only this many tokens, at the end of the prompt; None scores all.
        record_stability_info: for the loss stable_reinforce, which this server lacks: refused if true.
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


class SamplerInfo(Value):
    sampler_id: str
    base_model: str
    model_path: str | None = None


class GetSampler(Query[SamplerInfo], method="GET", path="/samplers/{sampler_id}"):
    """Client to service: what does this sampling session sample from?"""

    sampler_id: str
