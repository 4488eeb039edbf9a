"""Questions about prompts as vLLM takes them, and its answers, made here from a distribution that is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SamplingParams
from twinkle.server.samplers.prompt_answers import PromptAnswers
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.vllm import prompts

VOCAB = 20
PROMPT = np.array([3, 1, 4, 1, 5, 9], np.int64)
ROWS = len(PROMPT) - 1
_LOGITS = np.random.default_rng(0).normal(size=(ROWS, VOCAB)) * 3
PLAIN = (_LOGITS - np.log(np.exp(_LOGITS).sum(axis=1, keepdims=True))).astype(np.float32)
TARGETS = np.array([[-1, -1], [-1, -1], [7, -1], [0, 19], [-1, 5]], np.int64)


def asked(**more: Any) -> GenerateRequest:
    params = SamplingParams(temperature=more.pop("temperature", 1.0))
    return GenerateRequest("t", None, PROMPT, params, **more)


def answered(request: GenerateRequest, scores_tokens: bool) -> tuple[dict[str, Any], PromptAnswers]:
    """What vLLM is asked, and what becomes of its answer."""
    questions = prompts.questions(request, scores_tokens)
    flat = ids = None
    if (k := questions.get("prompt_logprobs")) is not None:
        width = VOCAB if k == -1 else k
        flat = SimpleNamespace(token_ids=[], logprobs=[])
        for row, token in zip(PLAIN, PROMPT[1:], strict=True):
            best = np.argsort(-row)[:width]
            flat.token_ids += [int(token), *best.tolist()]
            flat.logprobs += [float(row[token]), *row[best].tolist()]
    if (chosen := questions.get("prompt_logprob_token_ids")) is not None:
        start = questions["prompt_logprob_start"]
        assert chosen.shape[0] == ROWS - start
        scores = np.take_along_axis(PLAIN[start:], np.maximum(chosen, 0), 1)
        ids = np.where(chosen < 0, -np.inf, scores)
    output = SimpleNamespace(prompt_logprobs=flat, prompt_token_id_logprobs=ids)
    return questions, prompts.answers(request, output, 5, scores_tokens)


@pytest.mark.parametrize("scores_tokens", [False, True])
@pytest.mark.parametrize("last_n", [None, 1, 3, ROWS])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("with_targets", [False, True])
def test_answers_are_the_distributions_whatever_is_asked_together(
    scores_tokens: bool, last_n: int | None, k: int, with_targets: bool
):
    request = asked(
        prompt_logprobs=True,
        topk_prompt_logprobs=k,
        prompt_logprobs_last_n=last_n,
        target_tokens=TARGETS if with_targets else None,
    )
    _, found = answered(request, scores_tokens)
    n = ROWS if last_n is None else last_n
    own = PLAIN[np.arange(ROWS), PROMPT[1:]]
    assert found.prompt_logprobs is not None
    assert found.prompt_logprobs[: len(PROMPT) - n] == [None] * (len(PROMPT) - n)
    np.testing.assert_allclose(np.array(found.prompt_logprobs[-n:], float), own[-n:], rtol=1e-6)
    if k:
        assert found.topk_prompt_logprobs is not None and len(found.topk_prompt_logprobs) == len(PROMPT)
        assert found.topk_prompt_logprobs[: len(PROMPT) - n] == [None] * (len(PROMPT) - n)
        for row, listed in zip(PLAIN[-n:], found.topk_prompt_logprobs[len(PROMPT) - n :], strict=True):
            assert listed is not None and [token for token, _ in listed] == np.argsort(-row)[:k].tolist()
    if with_targets:
        assert found.target_prompt_logprobs is not None
        expected = np.where(TARGETS < 0, 0, np.take_along_axis(PLAIN, np.maximum(TARGETS, 0), 1))
        np.testing.assert_allclose(found.target_prompt_logprobs.to_numpy(), expected, rtol=1e-6)


def test_only_the_rows_and_tokens_that_are_wanted_are_asked_for_where_vllm_scores_tokens():
    questions, _ = answered(asked(target_tokens=TARGETS), True)
    assert questions.keys() == {"prompt_logprob_token_ids", "prompt_logprob_start"}
    assert questions["prompt_logprob_start"] == 2
    assert questions["prompt_logprob_token_ids"].tolist() == [[7, -1], [0, 19], [-1, 5]]
    questions, _ = answered(asked(prompt_logprobs=True, prompt_logprobs_last_n=2), True)
    assert questions["prompt_logprob_token_ids"].tolist() == [[5], [9]]
    assert questions["prompt_logprob_start"] == 3
    both = asked(prompt_logprobs=True, prompt_logprobs_last_n=2, target_tokens=TARGETS)
    assert answered(both, True)[0]["prompt_logprob_token_ids"].tolist() == [
        [-1, 7, -1],
        [5, 0, 19],
        [9, -1, 5],
    ]
    assert prompts.questions(asked(target_tokens=np.full((ROWS, 2), -1)), True) == {}


@pytest.mark.parametrize("scores_tokens", [False, True])
def test_alternatives_follow_the_tempered_distribution(scores_tokens: bool):
    questions, found = answered(asked(prompt_alt_tokens_k=20_000, temperature=0.5), scores_tokens)
    assert questions["prompt_logprobs"] == -1 and found.prompt_alt_tokens is not None
    tokens = found.prompt_alt_tokens.tokens.to_numpy()
    tempered = np.exp(PLAIN.astype(float) * 2)
    tempered /= tempered.sum(axis=1, keepdims=True)
    for row in range(ROWS):
        share = np.bincount(tokens[row], minlength=VOCAB) / 20_000
        np.testing.assert_allclose(share, tempered[row], atol=4 * np.sqrt(0.25 / 20_000))
    logprobs = found.prompt_alt_tokens.logprobs.to_numpy()
    np.testing.assert_allclose(logprobs, np.take_along_axis(PLAIN, tokens, 1), rtol=1e-6)
    questions, found = answered(asked(prompt_alt_tokens_k=2, temperature=0), scores_tokens)
    assert questions["prompt_logprobs"] == 1 and found.prompt_alt_tokens is not None
    assert found.prompt_alt_tokens.tokens.to_numpy().tolist() == [[t, t] for t in PLAIN.argmax(axis=1)]


def test_long_prompts_are_only_refused_where_the_whole_distribution_is_needed(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(prompts, "MAX_TABLE", VOCAB * ROWS - 1)
    for request, scores_tokens in (
        (asked(prompt_alt_tokens_k=1), True),
        (asked(target_tokens=TARGETS), False),
    ):
        with pytest.raises(InvalidRequest, match="for prompts of up to 5 tokens"):
            prompts.check(request, VOCAB, scores_tokens)
    for request, scores_tokens in (
        (asked(prompt_alt_tokens_k=1, temperature=0), False),
        (asked(target_tokens=TARGETS), True),
        (asked(prompt_logprobs=True, topk_prompt_logprobs=5), False),
    ):
        prompts.check(request, VOCAB, scores_tokens)
