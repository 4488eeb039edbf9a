"""Prompts that begin alike are read once, long ones piece by piece: the numbers are those of plain models."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine, batches

VOCAB = 512
DRAW = np.random.default_rng(11)
PREAMBLE = DRAW.integers(0, VOCAB, 40).tolist()
TAILS = [DRAW.integers(0, VOCAB, n).tolist() for n in (5, 1, 9)]


def ask(
    engine: TransformersEngine, prompt: list[int], adapter: str | None = None, tenant: str = "t", **more: Any
) -> Future[SampleResponse]:
    params = SamplingParams(max_tokens=more.pop("max_tokens", 4), stop=[], seed=3, temperature=1.0)
    return engine.generate(GenerateRequest(tenant, adapter, np.array(prompt, np.int64), params, **more))


def assert_as_plain(response: SampleResponse, model: torch.nn.Module, prompt: list[int]) -> None:
    """Sampled tokens have the log-probabilities that a forward pass over everything gives them."""
    for sequence in response.sequences:
        whole = prompt + sequence.tokens
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].float(), -1)
        expected = [logprobs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))]
        np.testing.assert_allclose(np.array(sequence.logprobs, float), expected, atol=1e-4)


@pytest.fixture
def passes(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """For each forward pass: rows, and tokens of each."""
    forward, made = engine._runner.forward, list[tuple[int, int]]()

    def counted(cache: Any, rows: slice, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
        made.append((tokens.shape[0], tokens.shape[1]))
        return forward(cache, rows, tokens, starts)

    monkeypatch.setattr(engine._runner, "forward", counted)
    yield made


def test_a_common_beginning_of_prompts_that_come_together_is_read_once(engine, references, passes):
    with engine._inbox.lock:  # so that all are admitted together
        pending = [ask(engine, PREAMBLE + tail, "small", max_tokens=1) for tail in TAILS]
    for tail, future in zip(TAILS, pending, strict=True):
        assert_as_plain(future.result(60), references["small"], PREAMBLE + tail)
    # The first reads all of its 45 tokens, the others then what they have of their own.
    assert passes == [(1, 45), (2, 9)]


def test_the_next_turn_of_a_conversation_reads_what_is_new(engine, references, passes):
    prompt = PREAMBLE + TAILS[0]
    first = ask(engine, prompt, "large").result(60)
    assert_as_plain(first, references["large"], prompt)
    following = prompt + first.sequences[0].tokens + TAILS[2]
    passes.clear()
    assert_as_plain(ask(engine, following, "large").result(60), references["large"], following)
    # The last sampled token has never been read.
    assert passes == [(1, 1 + len(TAILS[2])), (1, 1), (1, 1), (1, 1)]


def test_a_prompt_that_begins_like_a_running_ones_reads_the_rest(engine, references, passes, monkeypatch):
    arrived: list[Future[SampleResponse]] = []
    step = engine._loop.running.batch.step

    def step_and_ask(tokens: list[int]) -> torch.Tensor:
        if not arrived:
            arrived.append(ask(engine, PREAMBLE + TAILS[1], max_tokens=1))
        return step(tokens)

    monkeypatch.setattr(engine._loop.running.batch, "step", step_and_ask)
    running = ask(engine, PREAMBLE + TAILS[0], max_tokens=6)
    assert_as_plain(running.result(60), references[None], PREAMBLE + TAILS[0])
    assert_as_plain(arrived[0].result(60), references[None], PREAMBLE + TAILS[1])
    assert passes[:3] == [(1, 45), (1, 1), (1, len(TAILS[1]))]


def test_nothing_is_shared_between_tenants_adapters_or_versions_of_an_adapter(engine, states, passes):
    prompt = PREAMBLE + TAILS[0]
    for tenant, adapter in (("a", "small"), ("b", "small"), ("a", "other"), ("a", None)):
        ask(engine, prompt, adapter, tenant, max_tokens=1).result(60)
    assert passes == [(1, 45)] * 4
    engine.remove_adapter("small")
    engine.add_adapter("small", states["other"])
    passes.clear()
    ask(engine, prompt, "small", "a", max_tokens=1).result(60)
    assert passes == [(1, 45)]


def test_an_adapter_that_has_gone_leaves_nothing_behind(engine, passes):
    ask(engine, PREAMBLE, "small", max_tokens=1).result(60)
    running = ask(engine, PREAMBLE, "other", max_tokens=30)
    engine.remove_adapter("small")
    engine.remove_adapter("other")
    running.result(60)
    ask(engine, [1], max_tokens=1).result(60)
    assert not engine._loop.running.batch._prefixes


def test_a_prompt_whose_scores_are_wanted_is_read_from_where_they_begin(engine, references, passes):
    prompt = PREAMBLE + TAILS[0]
    with torch.no_grad():
        plain = torch.log_softmax(references["other"](input_ids=torch.tensor([prompt])).logits[0].float(), -1)
    own = [plain[i, token].item() for i, token in enumerate(prompt[1:])]
    ask(engine, prompt, "other", max_tokens=1).result(60)
    passes.clear()
    some = ask(engine, prompt, "other", max_tokens=1, prompt_logprobs=True, prompt_logprobs_last_n=20)
    listed = some.result(60).prompt_logprobs or []
    np.testing.assert_allclose(np.array(listed[-20:], float), own[-20:], atol=1e-4)
    whole = ask(engine, prompt, "other", max_tokens=1, prompt_logprobs=True).result(60)
    np.testing.assert_allclose(np.array((whole.prompt_logprobs or [])[1:], float), own, atol=1e-4)
    # Token 25 of 45 is the first whose successor is scored.
    assert passes == [(1, 21), (1, 45)]


def test_others_go_on_generating_while_a_long_prompt_is_read(engine, references, passes, monkeypatch):
    monkeypatch.setattr(batches, "DECODING_PREFILL_TOKENS", 16)
    long = DRAW.integers(0, VOCAB, 100).tolist()
    arrived: list[Future[SampleResponse]] = []
    step = engine._loop.running.batch.step

    def step_and_ask(tokens: list[int]) -> torch.Tensor:
        if not arrived:
            arrived.append(ask(engine, long, "other", max_tokens=1))
        return step(tokens)

    monkeypatch.setattr(engine._loop.running.batch, "step", step_and_ask)
    running = ask(engine, PREAMBLE, "small", max_tokens=12)
    assert_as_plain(running.result(60), references["small"], PREAMBLE)
    assert_as_plain(arrived[0].result(60), references["other"], long)
    # 100 tokens in pieces of 16, a step of the other between any two.
    assert passes[:15] == [(1, 40), (1, 1), *[(1, 16), (1, 1)] * 6, (1, 4)]


def test_a_leader_that_is_cancelled_leaves_its_followers_to_themselves(engine, references, monkeypatch):
    monkeypatch.setattr(batches, "PREFILL_TOKENS", 16)
    forward = engine._runner.forward

    def cancel_then_forward(*args: Any) -> torch.Tensor:
        engine.cancel("leader")
        return forward(*args)

    monkeypatch.setattr(engine._runner, "forward", cancel_then_forward)
    with engine._inbox.lock:
        leader = ask(engine, PREAMBLE * 2, "small", request_id="leader")
        followers = [ask(engine, PREAMBLE * 2 + tail, "small") for tail in TAILS]
    for tail, future in zip(TAILS, followers, strict=True):
        assert_as_plain(future.result(60), references["small"], PREAMBLE * 2 + tail)
    assert leader.exception(60) is not None
