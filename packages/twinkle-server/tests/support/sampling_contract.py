"""What every sampling engine does, against Transformers' own `generate` and PEFT: `from sampling_contract import *`.

The module that imports it has fixtures: `engine`, with the adapters "small" and "other" (rank 4) and "large" (rank 16,
without the output head); `references`, plain models by adapter, None for the base; `model_dir`. The model has 512
tokens, of which 0 to 255 are bytes, and a context of 256.
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.samplers.protocol import GenerateRequest

VOCAB = 512
EOS = 256
PROMPT = [7, 300, 21, 0, 511, 21, 8, 90, 256, 13, 4]


def ask(engine: Any, prompt, adapter: str | None = None, tenant: str = "t", **more) -> Any:
    params = SamplingParams(
        **{key: more.pop(key) for key in list(more) if key in SamplingParams.model_fields}
    )
    return engine.generate(GenerateRequest(tenant, adapter, np.asarray(prompt, np.int64), params, **more))


def plain_logprobs(model: torch.nn.Module, tokens, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].float()
    return torch.log_softmax(logits / temperature, -1)


def greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    """What `generate` says. (Left alone it takes the pad token's id for padding, which random prompts may hold.)"""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return whole[0, len(prompt) :].tolist()


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, draw.integers(1, 60)).tolist() for _ in range(n)]


def test_greedy_tokens_of_mixed_adapters_and_lengths_equal_generate(engine, references):
    names = [None, "small", "other", "large"]
    cases = [(prompt, names[i % 4]) for i, prompt in enumerate(prompts(16))]
    pending = [ask(engine, p, a, temperature=0, max_tokens=5 + i, stop=[]) for i, (p, a) in enumerate(cases)]
    for i, ((prompt, adapter), future) in enumerate(zip(cases, pending, strict=True)):
        expected = greedy(references[adapter], prompt, 5 + i)
        assert future.result(60).sequences[0].tokens == expected, (i, adapter)


def test_sampled_logprobs_are_of_the_tempered_distribution_and_prompt_logprobs_of_the_plain_one(
    engine, references
):
    [prompt] = prompts(1, seed=5)
    response = ask(
        engine,
        prompt,
        "large",
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        max_tokens=12,
        stop=[],
        prompt_logprobs=True,
    ).result(60)
    [sequence] = response.sequences
    whole = prompt + sequence.tokens
    tempered = plain_logprobs(references["large"], whole, 0.7)
    expected = [tempered[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence.tokens)]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)
    plain = plain_logprobs(references["large"], prompt)
    assert response.prompt_logprobs[0] is None
    np.testing.assert_allclose(
        response.prompt_logprobs[1:], [plain[i, t].item() for i, t in enumerate(prompt[1:])], atol=1e-4
    )


def test_the_likeliest_tokens_are_listed_where_asked_for(engine, references):
    prompt = [3, 1, 4, 1, 5]
    response = ask(
        engine, prompt, temperature=0, max_tokens=2, stop=[], topk_prompt_logprobs=3, topk_sample_logprobs=2
    ).result(60)
    plain = plain_logprobs(references[None], prompt + response.sequences[0].tokens)
    assert response.topk_prompt_logprobs[0] is None
    for i in range(1, 5):
        values, tokens = plain[i - 1].topk(3)
        assert [t for t, _ in response.topk_prompt_logprobs[i]] == tokens.tolist()
        np.testing.assert_allclose([v for _, v in response.topk_prompt_logprobs[i]], values, atol=1e-4)
    for i, row in enumerate(response.sequences[0].topk_logprobs):
        assert [t for t, _ in row] == plain[4 + i].topk(2).indices.tolist()


def test_a_seed_gives_the_same_samples_alone_and_in_company(engine):
    def seeded():
        return ask(
            engine, [1, 2, 3], "small", seed=42, num_samples=3, max_tokens=20, temperature=1.3, stop=[]
        )

    alone = [s.tokens for s in seeded().result(60).sequences]
    company = [ask(engine, p, "other", max_tokens=30, stop=[]) for p in prompts(6, seed=9)]
    together = [s.tokens for s in seeded().result(60).sequences]
    assert alone == together
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert all(len(f.result(60).sequences[0].tokens) == 30 for f in company)


def test_more_samples_than_places_all_come(engine):
    pending = [
        ask(engine, p, tenant=f"t{i % 3}", num_samples=1 + i % 11, max_tokens=6, stop=[])
        for i, p in enumerate(prompts(40, 3))
    ]
    for i, future in enumerate(pending):
        assert [len(s.tokens) for s in future.result(120).sequences] == [6] * (1 + i % 11)


def test_stops(engine, references):
    prompt = [72, 101, 108]
    free = ask(engine, prompt, temperature=0, max_tokens=30, stop=[]).result(60).sequences[0]
    assert free.stop_reason == "length" and len(free.tokens) == 30

    token = free.tokens[4]
    first = free.tokens.index(token)
    stopped = ask(engine, prompt, temperature=0, max_tokens=30, stop=[token]).result(60).sequences[0]
    assert stopped.stop_reason == "stop" and stopped.tokens == free.tokens[: first + 1]

    nothing = ask(engine, prompt, max_tokens=1, temperature=0).result(60).sequences[0]
    assert nothing.tokens == free.tokens[:1]


def test_a_stop_string_is_found_across_tokens(engine, model_dir: Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    # Tokens of this model are single bytes: search a sampled text for two neighbours that are plain letters.
    sampled = (
        (seed, future.result(60).sequences[0])
        for first in range(0, 200, 20)
        for seed, future in [
            (seed, ask(engine, [65], seed=seed, temperature=1.0, max_tokens=60, stop=[]))
            for seed in range(first, first + 20)
        ]
    )
    for seed, free in sampled:
        for i in range(len(free.tokens) - 1):
            pair = tokenizer.decode(free.tokens[i : i + 2], skip_special_tokens=False)
            if len(pair) == 2 and pair.isascii() and pair.isprintable() and max(free.tokens[: i + 2]) < 256:
                stopped = ask(engine, [65], seed=seed, max_tokens=60, stop=pair).result(60).sequences[0]
                text = tokenizer.decode(stopped.tokens, skip_special_tokens=False)
                assert stopped.stop_reason == "stop" and text.endswith(pair) and text.count(pair) == 1
                assert len(stopped.tokens) >= 2
                listed = ask(engine, [65], seed=seed, max_tokens=60, stop=["\0\0\0", pair]).result(60)
                assert listed.sequences[0].tokens == stopped.tokens
                return
    raise AssertionError("no two letters in 200 samples")


def test_the_end_of_text_token_stops_unless_stops_are_given(engine):
    eos = EOS
    for seed in range(400):
        free = ask(engine, [9], seed=seed, temperature=2.0, max_tokens=100, stop=[]).result(60).sequences[0]
        if eos in free.tokens[:-1]:
            ended = ask(engine, [9], seed=seed, temperature=2.0, max_tokens=100).result(60).sequences[0]
            assert ended.tokens == free.tokens[: free.tokens.index(eos) + 1]
            assert ended.stop_reason == "stop"
            return
    raise AssertionError("no end of text in 400 samples")


def test_what_cannot_be_fails_alone(engine):
    good = ask(engine, [1, 2], max_tokens=20, stop=[])
    with pytest.raises(NotFound, match="'nobody'"):
        ask(engine, [1, 2], "nobody").result(10)
    with pytest.raises(InvalidRequest, match="257 tokens"):
        ask(engine, [1] * 257).result(10)
    assert len(good.result(60).sequences[0].tokens) == 20


def test_a_result_nobody_waits_for_any_more_does_no_harm(engine):
    abandoned = ask(engine, [1, 2], max_tokens=30, stop=[])
    assert not abandoned.cancel()
    assert len(ask(engine, [1, 2], max_tokens=3, stop=[]).result(60).sequences[0].tokens) == 3


def test_an_adapter_is_a_copy_and_may_go_while_it_is_used(engine, states, references):
    prompt = [10, 20, 30]
    future = ask(engine, prompt, "small", temperature=0, max_tokens=100, stop=[])
    engine.remove_adapter("small")
    expected = greedy(references["small"], prompt, 100)
    assert future.result(60).sequences[0].tokens == expected
    with pytest.raises(NotFound):
        ask(engine, prompt, "small").result(10)


def test_the_context_is_a_limit_and_a_full_prompt_has_logprobs(engine):
    near = ask(engine, [1] * 250, stop=[]).result(60).sequences[0]
    assert len(near.tokens) == 6 and near.stop_reason == "length"
    full = ask(engine, [1] * 256, max_tokens=1, prompt_logprobs=True).result(60)
    assert len(full.prompt_logprobs) == 256


def test_cancelling_from_many_threads_ends_each_request_one_way_or_the_other(engine):
    names = [f"r{i}" for i in range(40)]
    expected = ask(engine, [8, 9], "small", temperature=0, max_tokens=60, stop=[]).result(60).sequences[0]
    pending = [
        ask(engine, [8, 9], "small", temperature=0, max_tokens=60, stop=[], request_id=name) for name in names
    ]
    threads = [
        threading.Thread(target=lambda part=part: [engine.cancel(name) for name in names[part::8]])
        for part in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, future in enumerate(pending):
        if i % 8 < 4 and isinstance(future.exception(60), CancelledError):
            continue
        assert future.result(60).sequences[0].tokens == expected.tokens


# ---------------------------------------------------------------- prompts


def ask_about(
    engine: Any,
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


def test_targets_are_scored_under_the_plain_distribution_whatever_the_temperature(engine, references):
    cases = [(PROMPT, None), (PROMPT[:4], "small"), (PROMPT[3:] * 4, "large"), (PROMPT, "other")]
    hot = SamplingParams(max_tokens=3, stop=[], temperature=0.3, top_k=2)
    all_targets = [random_targets(len(prompt) - 1, 1 + i) for i, (prompt, _) in enumerate(cases)]
    pending = [
        ask_about(engine, prompt, adapter, hot, target_tokens=targets)
        for (prompt, adapter), targets in zip(cases, all_targets, strict=True)
    ]
    for (prompt, adapter), targets, future in zip(cases, all_targets, pending, strict=True):
        response = future.result(60)
        assert_targets_scored(response, targets, row_logprobs(references[adapter], prompt))
        assert response.prompt_logprobs is None and response.prompt_alt_tokens is None


def test_targets_that_ask_for_nothing_are_answered_by_zeros(engine):
    nothing = ask_about(engine, [1, 2, 3], target_tokens=np.full((2, 3), -1)).result(60)
    assert nothing.target_prompt_logprobs is not None
    assert nothing.target_prompt_logprobs.to_numpy().tolist() == [[0.0] * 3] * 2


def test_targets_that_do_not_fit_are_refused_alone(engine):
    good = ask_about(engine, [1, 2], target_tokens=np.array([[511]]))
    for targets in (np.array([[512]]), np.array([[-2]]), np.zeros((2, 1), np.int64), np.zeros(1, np.int64)):
        with pytest.raises(InvalidRequest, match="target_prompt_logprobs"):
            ask_about(engine, [1, 2], target_tokens=targets).result(60)
    assert good.result(60).target_prompt_logprobs is not None


def test_logprobs_of_alternatives_are_of_the_plain_distribution(engine, references):
    params = SamplingParams(max_tokens=1, stop=[], temperature=0.7, top_k=1, top_p=0.1)
    for adapter, k in ((None, 1), ("large", 7)):
        response = ask_about(engine, PROMPT, adapter, params, prompt_alt_tokens_k=k).result(60)
        plain = row_logprobs(references[adapter], PROMPT)
        assert_alternatives_scored(response, k, plain)
    # top_k and top_p narrow the samples alone: a 1 would have left the likeliest.
    assert (alternatives_of(response) != plain.argmax(1)[:, None]).any()


def test_alternatives_are_distributed_as_the_tempered_softmax_says(engine, references):
    prompt, k = [17, 402, 3], 20_000
    params = SamplingParams(max_tokens=1, stop=[], temperature=0.7, seed=1, top_k=3)
    response = ask_about(engine, prompt, "small", params, prompt_alt_tokens_k=k).result(60)
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
    response = ask_about(engine, PROMPT, "other", params, prompt_alt_tokens_k=3).result(60)
    plain = row_logprobs(references["other"], PROMPT)
    assert alternatives_of(response).tolist() == [[token] * 3 for token in plain.argmax(1)]
    assert_alternatives_scored(response, 3, plain)


def test_a_seed_gives_the_same_alternatives_in_any_company_and_leaves_the_samples_as_they_are(engine):
    def seeded(seed: int = 5, **more: Any) -> Future[SampleResponse]:
        return ask_about(engine, PROMPT, "small", SamplingParams(max_tokens=20, stop=[], seed=seed), **more)

    alone = seeded(prompt_alt_tokens_k=4).result(60)
    company = [ask_about(engine, PROMPT * (1 + i), "other", prompt_alt_tokens_k=2) for i in range(6)]
    together = seeded(prompt_alt_tokens_k=4, num_samples=12, prompt_logprobs=True)
    company += [ask_about(engine, PROMPT[i:], None, prompt_alt_tokens_k=9) for i in range(6)]
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
    first, second = (
        ask_about(engine, PROMPT, params=params, prompt_alt_tokens_k=5).result(60) for _ in range(2)
    )
    assert alternatives_of(first).tolist() != alternatives_of(second).tolist()


def test_only_the_last_n_tokens_are_scored_and_targets_and_alternatives_are_not_affected(engine, references):
    length = len(PROMPT)
    plain = row_logprobs(references["large"], PROMPT)
    own = plain[np.arange(length - 1), PROMPT[1:]]
    targets = random_targets(length - 1, 2)
    for n in (1, 4, length - 1):
        response = ask_about(
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
    response = ask_about(
        engine, [9], prompt_logprobs=True, topk_prompt_logprobs=2, target_tokens=np.zeros((0, 3), np.int64),
        prompt_alt_tokens_k=4,
    ).result(60)  # fmt: skip
    assert response.prompt_logprobs == [None] and response.topk_prompt_logprobs == [None]
    assert response.target_prompt_logprobs is not None and response.prompt_alt_tokens is not None
    assert response.target_prompt_logprobs.shape == [0, 3]
    assert response.prompt_alt_tokens.tokens.shape == response.prompt_alt_tokens.logprobs.shape == [0, 4]
    assert response.prompt_alt_tokens.tokens.dtype == "int64"
    assert response.prompt_alt_tokens.logprobs.dtype == "float32"
