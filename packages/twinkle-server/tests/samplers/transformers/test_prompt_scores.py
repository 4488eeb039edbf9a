"""What answers about prompts cost, and how they are come by."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_contract import (
    PROMPT,
    VOCAB,
    alternatives_of,
    ask_about,
    assert_alternatives_scored,
    assert_targets_scored,
    random_targets,
    row_logprobs,
)
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.transformers import TransformersEngine, batches, model_runner

# ---------------------------------------------------------------- what it costs


@pytest.fixture
def logits_made(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """For each time that the engine computes logits, of how many positions."""
    network = engine._loop.running.batch._runner  # pyright: ignore[reportAttributeAccessIssue]
    compute, made = network.logits, list[int]()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        made.append(hidden.shape[0] * hidden.shape[1])
        return compute(hidden)

    monkeypatch.setattr(network, "logits", logits)
    yield made


def test_long_prompts_are_scored_piece_by_piece_with_the_same_answers(
    engine, references, logits_made: list[int], monkeypatch: pytest.MonkeyPatch
):
    prompt = PROMPT * 6
    targets = random_targets(len(prompt) - 1, 2)

    def answers() -> SampleResponse:
        return ask_about(
            engine, prompt, "large", prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=29,
            target_tokens=targets, prompt_alt_tokens_k=3,
        ).result(60)  # fmt: skip

    whole = answers()
    assert max(logits_made) == len(prompt) - 1
    logits_made.clear()
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS", 5 * VOCAB)
    monkeypatch.setattr(batches, "PREFILL_TOKENS", 16)
    in_pieces = answers()
    assert max(logits_made) == 5
    assert alternatives_of(in_pieces).tolist() == alternatives_of(whole).tolist()
    assert whole.prompt_logprobs is not None and in_pieces.prompt_logprobs is not None
    np.testing.assert_allclose(
        np.array(in_pieces.prompt_logprobs, float), np.array(whole.prompt_logprobs, float), atol=1e-4
    )
    plain = row_logprobs(references["large"], prompt)
    assert_targets_scored(in_pieces, targets, plain)
    assert_alternatives_scored(in_pieces, 3, plain)


def test_those_that_share_a_reading_with_a_scored_prompt_keep_their_adapters(
    engine, references, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batches, "PREFILL_TOKENS", 16)
    params = SamplingParams(max_tokens=1, stop=[], temperature=0)
    adapters = ["small", "other", None, "large", "other"]
    with engine._inbox.lock:  # so that all are admitted together
        pending = [
            ask_about(engine, PROMPT[i:], adapter, params, prompt_logprobs=i == 1)
            for i, adapter in enumerate(adapters)
        ]
    for i, (adapter, future) in enumerate(zip(adapters, pending, strict=True)):
        [sequence] = future.result(60).sequences
        # One more token, whatever it is, so that there is a row for the sampled one.
        likeliest = row_logprobs(references[adapter], [*PROMPT[i:], 0])[-1]
        assert sequence.tokens == [likeliest.argmax()]
        assert sequence.logprobs == pytest.approx([likeliest.max()], abs=1e-4)


def test_prompts_that_ask_nothing_cost_nothing_and_others_are_scored_once(engine, logits_made: list[int]):
    params = SamplingParams(max_tokens=1, stop=[])
    ask_about(engine, PROMPT, params=params, num_samples=20).result(60)
    assert sum(logits_made) == 3  # 8, 8 and 4 samples have a place at a time, and share a reading
    logits_made.clear()
    scored = ask_about(engine, PROMPT, params=params, num_samples=20, prompt_alt_tokens_k=2)
    other = ask_about(engine, PROMPT * 3, "small", params)
    scored.result(60)
    other.result(60)
    assert sum(logits_made) == len(PROMPT) - 1 + 3 + 1


def test_only_the_rows_that_are_asked_about_are_computed(engine, logits_made: list[int]):
    params = SamplingParams(max_tokens=1, stop=[])
    ask_about(engine, PROMPT, params=params, prompt_logprobs=True, prompt_logprobs_last_n=2).result(60)
    assert sorted(logits_made) == [1, 2]


# ---------------------------------------------------------------- layers with states


def test_a_model_with_linear_attention_answers_the_same(linear_model_dir: Path):
    config = ModelConfig(linear_model_dir)
    engine = TransformersEngine.create(config, TransformersBackend(config))
    reference = AutoModelForCausalLM.from_pretrained(linear_model_dir, dtype=torch.float32).eval()
    cases = [[5, 6, 7, 100], [9] * 12]
    params = SamplingParams(max_tokens=4, stop=[], temperature=0.7, seed=3)

    def answers(prompt: list[int], num_samples: int) -> Future[SampleResponse]:
        return ask_about(
            engine, prompt, params=params, num_samples=num_samples, prompt_logprobs=True,
            prompt_logprobs_last_n=2, target_tokens=random_targets(len(prompt) - 1, 2, 128),
            prompt_alt_tokens_k=5,
        )  # fmt: skip

    try:
        pending = [(answers(prompt, 20), answers(prompt, 1)) for prompt in cases]
        for prompt, futures in zip(cases, pending, strict=True):
            many, one = (future.result(60) for future in futures)
            plain = row_logprobs(reference, prompt)
            assert_targets_scored(many, random_targets(len(prompt) - 1, 2, 128), plain)
            assert_alternatives_scored(many, 5, plain)
            assert alternatives_of(many).tolist() == alternatives_of(one).tolist()
            assert many.prompt_logprobs is not None
            assert many.prompt_logprobs[:-2] == [None] * (len(prompt) - 2)
            own = plain[np.arange(len(prompt) - 1), prompt[1:]]
            np.testing.assert_allclose(np.array(many.prompt_logprobs[-2:], float), own[-2:], atol=1e-4)
            assert many.sequences[0].tokens == one.sequences[0].tokens
    finally:
        engine.close()
