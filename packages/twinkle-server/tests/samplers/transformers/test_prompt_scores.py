"""What is asked about prompts, against forward passes of plain Transformers and PEFT models."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine, batches, model_runner

VOCAB = 512
PROMPT = [7, 300, 21, 0, 511, 21, 8, 90, 256, 13, 4]


def ask(
    engine: TransformersEngine,
    prompt: list[int],
    adapter: str | None = None,
    params: SamplingParams | None = None,
    **more: Any,
) -> Future[SampleResponse]:
    params = params or SamplingParams(max_tokens=2, stop=[], seed=5)
    return engine.generate(GenerateRequest("t", adapter, np.array(prompt, np.int64), params, **more))


def row_logprobs(model: torch.nn.Module, prompt: list[int], temperature: float = 1.0) -> np.ndarray:
    """Row i is the distribution over prompt token i + 1: [T - 1, vocabulary]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1].float()
    return torch.log_softmax(logits / temperature, -1).numpy()


def random_targets(rows: int, k: int, vocab: int = VOCAB) -> np.ndarray:
    """About a third are -1, and so is all of row 0."""
    draw = np.random.default_rng(rows + k)
    targets = np.where(draw.random((rows, k)) < 0.3, -1, draw.integers(0, vocab, (rows, k)))
    targets[:1] = -1
    return targets.astype(np.int64)


def assert_targets_scored(response: SampleResponse, targets: np.ndarray, plain: np.ndarray) -> None:
    assert response.target_prompt_logprobs is not None
    scored = response.target_prompt_logprobs.to_numpy()
    assert scored.dtype == np.float32 and scored.shape == targets.shape
    expected = np.take_along_axis(plain, np.maximum(targets, 0), 1)
    np.testing.assert_allclose(scored, np.where(targets < 0, 0, expected), atol=1e-4)
    assert (scored[targets < 0] == 0).all()


def alternatives_of(response: SampleResponse) -> np.ndarray:
    assert response.prompt_alt_tokens is not None
    return response.prompt_alt_tokens.tokens.to_numpy()


def assert_alternatives_scored(response: SampleResponse, k: int, plain: np.ndarray) -> None:
    tokens = alternatives_of(response)
    assert response.prompt_alt_tokens is not None
    logprobs = response.prompt_alt_tokens.logprobs.to_numpy()
    assert tokens.dtype == np.int64 and logprobs.dtype == np.float32
    assert tokens.shape == logprobs.shape == (len(plain), k)
    np.testing.assert_allclose(logprobs, np.take_along_axis(plain, tokens, 1), atol=1e-4)


# ---------------------------------------------------------------- targets


def test_targets_are_scored_under_the_plain_distribution_whatever_the_temperature(engine, references):
    cases = [(PROMPT, None), (PROMPT[:4], "small"), (PROMPT[3:] * 4, "large"), (PROMPT, "other")]
    hot = SamplingParams(max_tokens=3, stop=[], temperature=0.3, top_k=2)
    all_targets = [random_targets(len(prompt) - 1, 1 + i) for i, (prompt, _) in enumerate(cases)]
    pending = [
        ask(engine, prompt, adapter, hot, target_tokens=targets)
        for (prompt, adapter), targets in zip(cases, all_targets, strict=True)
    ]
    for (prompt, adapter), targets, future in zip(cases, all_targets, pending, strict=True):
        response = future.result(60)
        assert_targets_scored(response, targets, row_logprobs(references[adapter], prompt))
        assert response.prompt_logprobs is None and response.prompt_alt_tokens is None


def test_targets_that_ask_for_nothing_are_answered_by_zeros(engine):
    nothing = ask(engine, [1, 2, 3], target_tokens=np.full((2, 3), -1)).result(60)
    assert nothing.target_prompt_logprobs is not None
    assert nothing.target_prompt_logprobs.to_numpy().tolist() == [[0.0] * 3] * 2


def test_targets_that_do_not_fit_are_refused_alone(engine):
    good = ask(engine, [1, 2], target_tokens=np.array([[511]]))
    for targets in (np.array([[512]]), np.array([[-2]]), np.zeros((2, 1), np.int64), np.zeros(1, np.int64)):
        with pytest.raises(InvalidRequest, match="target_prompt_logprobs"):
            ask(engine, [1, 2], target_tokens=targets).result(60)
    assert good.result(60).target_prompt_logprobs is not None


# ---------------------------------------------------------------- alternatives


def test_logprobs_of_alternatives_are_of_the_plain_distribution(engine, references):
    params = SamplingParams(max_tokens=1, stop=[], temperature=0.7, top_k=1, top_p=0.1)
    for adapter, k in ((None, 1), ("large", 7)):
        response = ask(engine, PROMPT, adapter, params, prompt_alt_tokens_k=k).result(60)
        plain = row_logprobs(references[adapter], PROMPT)
        assert_alternatives_scored(response, k, plain)
    # top_k and top_p narrow the samples alone: a 1 would have left the likeliest.
    assert (alternatives_of(response) != plain.argmax(1)[:, None]).any()


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic, as standard deviations from its mean; tokens too rare to count alone are counted together.

    With d degrees of freedom the statistic has mean d and variance 2 d.
    """
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    common = expected >= 10
    expected = np.append(expected[common], expected[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())
    freedom = len(expected) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_alternatives_are_distributed_as_the_tempered_softmax_says(engine, references):
    prompt, k = [17, 402, 3], 20_000
    params = SamplingParams(max_tokens=1, stop=[], temperature=0.7, seed=1, top_k=3)
    response = ask(engine, prompt, "small", params, prompt_alt_tokens_k=k).result(60)
    tempered = np.exp(row_logprobs(references["small"], prompt, 0.7).astype(float))
    plain = np.exp(row_logprobs(references["small"], prompt).astype(float))
    tokens = alternatives_of(response)
    for row in range(2):
        assert abs(chi_square(tokens[row], tempered[row])) < 4
        assert chi_square(tokens[row], plain[row]) > 20  # so that the statistic could tell
    # Independent within and between rows: neighbours agree as often as chance has it.
    for left, right, p, q in (
        (tokens[0, ::2], tokens[0, 1::2], tempered[0], tempered[0]),
        (tokens[0], tokens[1], tempered[0], tempered[1]),
    ):
        chance = float(p @ q)
        agreeing = float((left == right).mean())
        assert abs(agreeing - chance) < 4 * np.sqrt(chance * (1 - chance) / len(left))


def test_alternatives_at_temperature_0_are_the_likeliest(engine, references):
    params = SamplingParams(max_tokens=1, temperature=0)
    response = ask(engine, PROMPT, "other", params, prompt_alt_tokens_k=3).result(60)
    plain = row_logprobs(references["other"], PROMPT)
    assert alternatives_of(response).tolist() == [[token] * 3 for token in plain.argmax(1)]
    assert_alternatives_scored(response, 3, plain)


def test_a_seed_gives_the_same_alternatives_in_any_company_and_leaves_the_samples_as_they_are(engine):
    def seeded(seed: int = 5, **more: Any) -> Future[SampleResponse]:
        return ask(engine, PROMPT, "small", SamplingParams(max_tokens=20, stop=[], seed=seed), **more)

    alone = seeded(prompt_alt_tokens_k=4).result(60)
    company = [ask(engine, PROMPT * (1 + i), "other", prompt_alt_tokens_k=2) for i in range(6)]
    together = seeded(prompt_alt_tokens_k=4, num_samples=12, prompt_logprobs=True)
    company += [ask(engine, PROMPT[i:], None, prompt_alt_tokens_k=9) for i in range(6)]
    assert alternatives_of(together.result(60)).tolist() == alternatives_of(alone).tolist()
    assert (
        alternatives_of(seeded(6, prompt_alt_tokens_k=4).result(60)).tolist()
        != alternatives_of(alone).tolist()
    )
    assert seeded().result(60).sequences[0].tokens == alone.sequences[0].tokens
    for future in company:
        future.result(60)


def test_alternatives_without_a_seed_differ_from_one_request_to_the_next(engine):
    params = SamplingParams(max_tokens=1)
    first, second = (ask(engine, PROMPT, params=params, prompt_alt_tokens_k=5).result(60) for _ in range(2))
    assert alternatives_of(first).tolist() != alternatives_of(second).tolist()


# ---------------------------------------------------------------- the last n


def test_only_the_last_n_tokens_are_scored_and_targets_and_alternatives_are_not_affected(engine, references):
    length = len(PROMPT)
    plain = row_logprobs(references["large"], PROMPT)
    own = plain[np.arange(length - 1), PROMPT[1:]]
    targets = random_targets(length - 1, 2)
    for n in (1, 4, length - 1):
        response = ask(
            engine, PROMPT, "large", prompt_logprobs=True, topk_prompt_logprobs=3, prompt_logprobs_last_n=n,
            target_tokens=targets, prompt_alt_tokens_k=2,
        ).result(60)  # fmt: skip
        assert response.prompt_logprobs is not None and response.topk_prompt_logprobs is not None
        assert response.prompt_logprobs[: length - n] == [None] * (length - n)
        assert response.topk_prompt_logprobs[: length - n] == [None] * (length - n)
        np.testing.assert_allclose(
            np.array(response.prompt_logprobs[length - n :], float), own[-n:], atol=1e-4
        )
        for row, listed in zip(plain[-n:], response.topk_prompt_logprobs[length - n :], strict=True):
            assert listed is not None
            assert [token for token, _ in listed] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose([value for _, value in listed], np.sort(row)[::-1][:3], atol=1e-4)
        assert_targets_scored(response, targets, plain)
        assert_alternatives_scored(response, 2, plain)


def test_a_prompt_of_one_token_has_no_rows(engine):
    response = ask(
        engine, [9], prompt_logprobs=True, topk_prompt_logprobs=2, target_tokens=np.zeros((0, 3), np.int64),
        prompt_alt_tokens_k=4,
    ).result(60)  # fmt: skip
    assert response.prompt_logprobs == [None] and response.topk_prompt_logprobs == [None]
    assert response.target_prompt_logprobs is not None and response.prompt_alt_tokens is not None
    assert response.target_prompt_logprobs.shape == [0, 3]
    assert response.prompt_alt_tokens.tokens.shape == response.prompt_alt_tokens.logprobs.shape == [0, 4]
    assert response.prompt_alt_tokens.tokens.dtype == "int64"
    assert response.prompt_alt_tokens.logprobs.dtype == "float32"


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
        return ask(
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
            ask(engine, PROMPT[i:], adapter, params, prompt_logprobs=i == 1)
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
    ask(engine, PROMPT, params=params, num_samples=20).result(60)
    assert sum(logits_made) == 3  # 8, 8 and 4 samples have a place at a time, and share a reading
    logits_made.clear()
    scored = ask(engine, PROMPT, params=params, num_samples=20, prompt_alt_tokens_k=2)
    other = ask(engine, PROMPT * 3, "small", params)
    scored.result(60)
    other.result(60)
    assert sum(logits_made) == len(PROMPT) - 1 + 3 + 1


def test_only_the_rows_that_are_asked_about_are_computed(engine, logits_made: list[int]):
    params = SamplingParams(max_tokens=1, stop=[])
    ask(engine, PROMPT, params=params, prompt_logprobs=True, prompt_logprobs_last_n=2).result(60)
    assert sorted(logits_made) == [1, 2]


# ---------------------------------------------------------------- one request at a time


def test_a_model_with_linear_attention_answers_the_same(linear_model_dir: Path):
    config = ModelConfig(linear_model_dir)
    engine = TransformersEngine.create(config, TransformersBackend(config))
    reference = AutoModelForCausalLM.from_pretrained(linear_model_dir, dtype=torch.float32).eval()
    cases = [[5, 6, 7, 100], [9] * 12]
    params = SamplingParams(max_tokens=4, stop=[], temperature=0.7, seed=3)

    def answers(prompt: list[int], num_samples: int) -> Future[SampleResponse]:
        return ask(
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
