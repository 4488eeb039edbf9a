from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.samplers.fake import LOGPROB, FakeEngine
from twinkle.server.samplers.protocol import GenerateRequest

# Tables are float32.
LISTED = float(np.float32(LOGPROB))


def ask(
    params: SamplingParams | None = None, adapter: str | None = None, **more: Any
) -> Future[SampleResponse]:
    prompt = np.array([1, 2, 3, 4], np.int64)
    return FakeEngine().generate(GenerateRequest("t", adapter, prompt, params or SamplingParams(), **more))


def test_what_was_asked_about_the_prompt_is_answered_in_the_real_shapes():
    targets = np.array([[5, -1], [-1, -1], [7, 8]], np.int64)
    response = ask(
        prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=2, target_tokens=targets,
        prompt_alt_tokens_k=3, topk_sample_logprobs=1, request_id="r",
    ).result(0)  # fmt: skip
    assert response.prompt_logprobs == [None, None, LOGPROB, LOGPROB]
    assert response.topk_prompt_logprobs == [None, None, *([[(0, LISTED), (1, LISTED)]] * 2)]
    assert response.target_prompt_logprobs is not None and response.prompt_alt_tokens is not None
    expected = np.array([[LOGPROB, 0], [0, 0], [LOGPROB, LOGPROB]], np.float32)
    np.testing.assert_array_equal(response.target_prompt_logprobs.to_numpy(), expected, strict=True)
    assert response.prompt_alt_tokens.tokens.tolist() == [[10, 11, 12], [11, 12, 13], [12, 13, 14]]
    assert response.prompt_alt_tokens.logprobs.tolist() == np.full((3, 3), LOGPROB, np.float32).tolist()
    [sequence] = response.sequences
    assert sequence.topk_logprobs == [[(0, LISTED)]] * len(sequence.tokens)


def test_what_was_not_asked_is_not_answered():
    response = ask().result(0)
    assert response.prompt_logprobs is None and response.topk_prompt_logprobs is None
    assert response.target_prompt_logprobs is None and response.prompt_alt_tokens is None
    assert response.sequences[0].topk_logprobs is None


def test_alternatives_follow_the_seed_and_are_the_likeliest_at_temperature_0():
    def drawn(params: SamplingParams) -> list[list[int]]:
        response = ask(params, prompt_alt_tokens_k=2).result(0)
        assert response.prompt_alt_tokens is not None
        return response.prompt_alt_tokens.tokens.tolist()

    assert drawn(SamplingParams(seed=1)) == drawn(SamplingParams(seed=1)) != drawn(SamplingParams(seed=2))
    assert drawn(SamplingParams(temperature=0)) == [[0, 0]] * 3


def test_cancelling_changes_nothing_that_is_done():
    engine = FakeEngine()
    future = engine.generate(GenerateRequest("t", None, np.array([1]), request_id="r"))
    engine.cancel("r")
    engine.cancel("unknown")
    assert len(future.result(0).sequences) == 1


def test_an_adapter_that_is_not_there_is_not_found():
    with pytest.raises(NotFound, match="'nobody'"):
        ask(adapter="nobody").result(0)
