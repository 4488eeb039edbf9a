"""Models whose rope depends on the length of a call: what is sampled and scored is what Transformers computes alone.

What holds of a sample that crosses the boundary: each of its tokens is drawn from the distribution that Transformers
gives to what was there before it, and has that log-probability. Transformers on the finished text, and so the trainer,
gives the tokens before the boundary other ones, with the long factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_longrope
import torch
from tiny_longrope import CONTEXT, ORIGINAL, VOCAB
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine, batches
from twinkle.server.samplers.transformers.batches import SlotBatch

DRAW = np.random.default_rng(5)
PROMPTS = [DRAW.integers(3, VOCAB, n).tolist() for n in (20, 100, ORIGINAL, ORIGINAL + 1, 28, 5)]


@pytest.fixture(scope="module", params=["phi3", "phi3-window", "phimoe", "dynamic"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_longrope.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture
def engine(model_dir: Path) -> Iterator[TransformersEngine]:
    config = ModelConfig(model_dir)
    engine = TransformersEngine(TransformersBackend(config).loaded, config, max_rows=8)
    yield engine
    engine.close()


def ask(engine: TransformersEngine, prompt: list[int], **more: Any) -> Future[SampleResponse]:
    params = SamplingParams(
        max_tokens=more.pop("max_tokens", 12),
        temperature=more.pop("temperature", 1.0),
        seed=more.pop("seed", 0),
        stop=[],
    )
    return engine.generate(GenerateRequest("t", None, np.array(prompt, np.int64), params, **more))


def alone(reference: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after each token of a row that is computed alone, [n, vocabulary]."""
    with torch.no_grad():
        logits = reference(torch.tensor([tokens]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def assert_as_alone(reference: Any, prompt: list[int], response: SampleResponse) -> None:
    """Each sampled token was drawn after what was there then, read alone from its beginning."""
    for sequence in response.sequences:
        expected = [
            alone(reference, prompt + sequence.tokens[:i])[-1, token].item()
            for i, token in enumerate(sequence.tokens)
        ]
        np.testing.assert_allclose(np.array(sequence.logprobs), expected, atol=1e-4)
    if response.prompt_logprobs is not None:
        scores = alone(reference, prompt)
        expected = [scores[i, token].item() for i, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(np.array(response.prompt_logprobs[1:], float), expected, atol=1e-4)


def test_rows_of_both_sides_are_each_as_alone(engine, reference):
    with engine._inbox.lock:
        pending = [
            ask(engine, prompt, seed=i, num_samples=2, prompt_logprobs=True)
            for i, prompt in enumerate(PROMPTS)
        ]
    for prompt, future in zip(PROMPTS, pending, strict=True):
        assert_as_alone(reference, prompt, future.result(60))


def test_pieces_of_a_long_prompt_are_read_as_the_whole(engine, reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batches, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(batches, "DECODING_PREFILL_TOKENS", 8)
    with engine._inbox.lock:
        pending = [ask(engine, prompt, seed=i, prompt_logprobs=True) for i, prompt in enumerate(PROMPTS)]
    for prompt, future in zip(PROMPTS, pending, strict=True):
        assert_as_alone(reference, prompt, future.result(60))


def test_what_is_known_of_one_side_is_not_taken_for_the_other(engine, reference):
    short = PROMPTS[1][:25]
    for prompt in (short, PROMPTS[1], short + [9], PROMPTS[1] + [9], PROMPTS[1][:40]):
        response = ask(engine, prompt, max_tokens=1, prompt_logprobs_last_n=2, topk_prompt_logprobs=1).result(
            60
        )
        assert_as_alone(reference, prompt, response)
        best = alone(reference, prompt)[-2].max().item()
        [(_, value)] = (response.topk_prompt_logprobs or [])[-1] or []
        assert value == pytest.approx(best, abs=1e-4)


def test_greedy_text_is_that_of_generate(engine, reference):
    """Across the boundary too: where it is crossed, Phi-3's `generate` begins its cache anew as well."""
    across = type(reference).__name__ in ("Phi3ForCausalLM", "LlamaForCausalLM")
    pending = [ask(engine, prompt, temperature=0, max_tokens=12) for prompt in PROMPTS]
    for prompt, future in zip(PROMPTS, pending, strict=True):
        count = 12 if across or len(prompt) > ORIGINAL else min(12, ORIGINAL + 1 - len(prompt))
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
            )
        assert future.result(60).sequences[0].tokens[:count] == whole[0, len(prompt) :].tolist()


def test_the_finished_row_is_scored_as_the_trainer_scores_it(engine, model_dir: Path, reference):
    prompt = PROMPTS[4]
    sampled = ask(engine, prompt, max_tokens=20).result(60).sequences[0]
    whole = prompt + sampled.tokens
    scored = ask(engine, whole, max_tokens=1, prompt_logprobs=True).result(60)
    assert_as_alone(reference, whole, scored)
    # From the token on that is drawn beyond the boundary, what was sampled agrees with it.
    first = ORIGINAL + 1 - len(prompt)
    later = (scored.prompt_logprobs or [])[len(prompt) + first :]
    np.testing.assert_allclose(np.array(later, float), np.array(sampled.logprobs)[first:], atol=1e-4)


def test_a_full_context_beside_others_has_the_numbers_that_it_has_alone(engine, reference):
    full = DRAW.integers(3, VOCAB, CONTEXT - 4).tolist()
    ask(engine, full[:-1], max_tokens=1).result(60)  # so that it begins near its end, where others begin at 0
    with engine._inbox.lock:
        pending = [
            (prompt, ask(engine, prompt, max_tokens=4)) for prompt in (full, PROMPTS[1], PROMPTS[1][::-1])
        ]
    for prompt, future in pending:
        assert_as_alone(reference, prompt, future.result(60))


def test_rows_of_both_sides_are_in_one_batch(engine):
    assert isinstance(engine._loop.running.batch, SlotBatch)
