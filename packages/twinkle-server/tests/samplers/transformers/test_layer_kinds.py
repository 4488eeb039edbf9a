"""Models with windows and states are batched continuously too, with the numbers that they have alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_layer_kinds
import torch
from sampling_contract import *  # noqa: F403
from sampling_contract import ask, greedy, plain_logprobs, prompts
from tiny_layer_kinds import VOCAB, WINDOW
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import SampleResponse
from twinkle.server.samplers.transformers import TransformersEngine, batches
from twinkle.server.samplers.transformers.batches import SlotBatch
from twinkle.server.samplers.transformers.recurrence import Sharing

DRAW = np.random.default_rng(3)
# Shorter and longer than a window, than a pass, and than a block of the cache; some begin alike.
LONG = DRAW.integers(0, VOCAB, 100).tolist()
COMPANY = [
    *(DRAW.integers(0, VOCAB, n).tolist() for n in (5, 1, 40, WINDOW, WINDOW + 1, 64, 3)),
    LONG,
    [*LONG[:70], 5, 6, 7],
    LONG,
    [*LONG, 9],
]


# The others, which are more of the same kinds, with `hatch run families`.
ALWAYS = ("bamba", "gemma3", "jamba", "lfm2", "qwen3_5", "qwen3_5_moe")
KINDS = tiny_layer_kinds.CONFIGS if os.environ.get("TWINKLE_ALL_FAMILIES") == "1" else ALWAYS


@pytest.fixture(scope="module", params=sorted(KINDS))
def model_dir(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tiny_layer_kinds.save(request.param, tmp_path_factory.mktemp(request.param))
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def references(references, states, model_dir: Path) -> dict[str | None, torch.nn.Module]:
    """PEFT's; where PEFT reads adapters otherwise, the base with B A alpha / rank added to each weight."""
    if not model_dir.name.startswith("qwen3_next"):
        return references
    merged: dict[str | None, torch.nn.Module] = {None: references[None]}
    for name, state in states.items():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        for layer in state.target_modules:
            a, b = (
                torch.tensor(state.weights[f"base_model.model.{layer}.lora_{side}.weight"]) for side in "AB"
            )
            weight = model.get_submodule(layer).weight.data
            weight += state.spec.alpha / state.spec.rank * (b @ a)
        merged[name] = model
    return merged


def assert_as_alone(response: SampleResponse, model: torch.nn.Module, prompt: list[int]) -> None:
    for sequence in response.sequences:
        plain = plain_logprobs(model, prompt + sequence.tokens)
        expected = [plain[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence.tokens)]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-4)
    if response.prompt_logprobs is not None:
        plain = plain_logprobs(model, prompt)
        expected = [plain[i, token].item() for i, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(np.array(response.prompt_logprobs[1:], float), expected, atol=1e-4)


@pytest.fixture
def company(engine: TransformersEngine, references) -> Iterator[list[tuple[Any, list[int], Future[Any]]]]:
    """Asks for samples of all of COMPANY at once, of several adapters; checks them at the end."""
    names = [None, "small", "large"]
    pending: list[tuple[Any, list[int], Future[Any]]] = []
    with engine._inbox.lock:
        for i, prompt in enumerate(COMPANY):
            name = names[i % 3]
            more: dict[str, Any] = {"num_samples": 1 + i % 3, "prompt_logprobs": i % 4 == 0}
            future = ask(engine, prompt, name, max_tokens=6 + 4 * i, seed=i, stop=[], **more)
            pending.append((references[name], prompt, future))
    yield pending
    for model, prompt, future in pending:
        assert_as_alone(future.result(120), model, prompt)


def test_rows_of_all_lengths_come_and_go_in_one_batch(engine, company):
    assert isinstance(engine._loop.running.batch, SlotBatch)


def test_a_second_crowd_finds_what_the_first_has_left(engine, company, references):
    for model, prompt, future in company:
        [sequence, *_] = future.result(120).sequences
        following = [*prompt, *sequence.tokens, 3, 1, 4]
        name = next(name for name, one in references.items() if one is model)
        assert_as_alone(ask(engine, following, name, max_tokens=3, stop=[]).result(60), model, following)


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PREFILL_TOKENS", 24)
    monkeypatch.setattr(batches, "DECODING_PREFILL_TOKENS", 24)


def test_prompts_are_read_piece_by_piece(small_passes, company):
    pass


@pytest.fixture
def unpadded(engine: TransformersEngine) -> None:
    if engine._runner.sharing is Sharing.PADDED:
        engine._runner.sharing = Sharing.EVEN


def test_prompts_of_different_lengths_go_through_without_padding(unpadded, engine, company):
    assert engine._runner.sharing is not Sharing.PADDED


def test_greedy_text_is_that_of_generate_with_its_own_cache(engine, references):
    cases = [*prompts(6, seed=9), LONG]
    pending = [ask(engine, prompt, "small", temperature=0, max_tokens=40, stop=[]) for prompt in cases]
    for prompt, future in zip(cases, pending, strict=True):
        assert future.result(60).sequences[0].tokens == greedy(references["small"], prompt, 40)


def test_a_pass_that_fails_halfway_is_made_up_for(engine, references, monkeypatch: pytest.MonkeyPatch):
    """Layers before the one that fails have taken the newest tokens in, those behind it have not."""
    last = engine._runner._body.layers[-1]
    calls: list[int] = []
    forward = type(last).forward

    def failing(self: Any, hidden: torch.Tensor, *args: Any, **more: Any) -> Any:
        if self is last and hidden.shape[1] == 1:
            calls.append(hidden.shape[0])
            if len(calls) == 9:
                raise torch.OutOfMemoryError("for once")
        return forward(self, hidden, *args, **more)

    monkeypatch.setattr(type(last), "forward", failing)
    cases = [LONG[:n] for n in (30, 7, 50)]
    pending = [ask(engine, prompt, "other", max_tokens=20, stop=[], seed=1) for prompt in cases]
    for prompt, future in zip(cases, pending, strict=True):
        assert_as_alone(future.result(60), references["other"], prompt)
    assert len(calls) > 9


def test_samples_that_are_paused_go_on_as_if_nothing_had_been(engine, references):
    limits = engine._loop.running.batch.limits
    many = [ask(engine, LONG[:n], "large", "greedy", max_tokens=60, stop=[], seed=n) for n in range(20, 30)]
    late = ask(engine, LONG[50:], "small", "modest", max_tokens=5, stop=[], seed=1)
    assert len(many) > limits.rows
    assert_as_alone(late.result(60), references["small"], LONG[50:])
    for n, future in zip(range(20, 30), many, strict=True):
        assert_as_alone(future.result(60), references["large"], LONG[:n])


def test_a_common_beginning_is_read_once(engine, references, monkeypatch: pytest.MonkeyPatch):
    forward, passes = engine._runner.forward, list[tuple[int, int]]()

    def counted(cache: Any, rows: slice, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
        passes.append((tokens.shape[0], tokens.shape[1]))
        return forward(cache, rows, tokens, starts)

    monkeypatch.setattr(engine._runner, "forward", counted)
    cases = [[*LONG[:60], *tail] for tail in ([1, 2, 3], [4, 5, 6], [7, 8, 9])]
    with engine._inbox.lock:
        pending = [ask(engine, prompt, "small", max_tokens=1, stop=[]) for prompt in cases]
    for prompt, future in zip(cases, pending, strict=True):
        assert_as_alone(future.result(60), references["small"], prompt)
    read = sum(rows * tokens for rows, tokens in passes)
    if engine._runner.sharing is Sharing.WHOLE:
        assert read == 3 * 63
    else:
        assert read == 60 + 3 * 3
