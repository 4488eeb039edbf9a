"""Samples that are paused and go on: bounds in steps of the batch, and the numbers of runs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running_out import fail_when

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.cache_usage import CacheUsage
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine, memory

LONG = [7, 8, 9]
SHORT = [1, 2]

Make = Callable[..., TransformersEngine]


@pytest.fixture
def make(backend: TransformersBackend, tiny_model_dir: Path, states) -> Iterator[Make]:
    """Engines of the tiny model, whose context is 256 tokens."""
    made: list[TransformersEngine] = []

    def make(**limits: int) -> TransformersEngine:
        engine = TransformersEngine(backend.loaded, ModelConfig(tiny_model_dir), **limits)
        engine.add_adapter("small", states["small"])
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def ask(engine: TransformersEngine, prompt: list[int], tenant: str, **more: Any) -> Future[SampleResponse]:
    params = SamplingParams(
        max_tokens=more.pop("max_tokens"), stop=[], seed=more.pop("seed", 5), temperature=1.2
    )
    request = GenerateRequest(tenant, more.pop("adapter", "small"), np.array(prompt), params, **more)
    return engine.generate(request)


class Steps:
    """Counts the steps of a batch, and asks for something before one of them."""

    def __init__(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []  # of each step
        self.ended: dict[str, int] = {}  # steps until then, by name
        self.then: dict[int, Callable[[], None]] = {}
        step = engine._loop.running.batch.step

        def counted(tokens: Any) -> torch.Tensor:
            self.then.pop(len(self.rows), lambda: None)()
            self.rows.append(len(tokens))
            return step(tokens)

        monkeypatch.setattr(engine._loop.running.batch, "step", counted)

    def note(self, name: str, future: Future[SampleResponse]) -> None:
        future.add_done_callback(lambda _: self.ended.setdefault(name, len(self.rows)))


def assert_close(found: Sequence[float | None] | None, expected: Sequence[float | None] | None) -> None:
    assert found is not None and expected is not None
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), atol=1e-4)


def assert_alike(response: SampleResponse, alone: SampleResponse) -> None:
    for sequence, expected in zip(response.sequences, alone.sequences, strict=True):
        assert sequence.tokens == expected.tokens
        assert_close(sequence.logprobs, expected.logprobs)


def ask_while(
    engine: TransformersEngine, steps: Steps, at: int, prompt: list[int], **more: Any
) -> list[Future[SampleResponse]]:
    """A request before a step that is to come."""
    asked: list[Future[SampleResponse]] = []

    def now() -> None:
        asked.append(ask(engine, prompt, "modest", **more))
        steps.note("modest", asked[0])

    steps.then[at] = now
    return asked


@pytest.mark.parametrize("at", [2, 60])
def test_what_long_samples_may_become_keeps_nobody_out(make: Make, monkeypatch, at: int):
    """Four of up to 120 tokens where there is room for 128 in all: at step 2 nothing is full, at 60 all is."""
    engine = make(max_rows=8, max_cached_tokens=128)
    alone = ask(engine, LONG, "greedy", max_tokens=120, num_samples=4).result(60)
    short = ask(engine, SHORT, "modest", max_tokens=5, prompt_logprobs=True).result(60)
    steps = Steps(engine, monkeypatch)
    long = ask(engine, LONG, "greedy", max_tokens=120, num_samples=4)
    [asked] = [ask_while(engine, steps, at, SHORT, max_tokens=5, prompt_logprobs=True)]
    assert_alike(long.result(60), alone)
    assert_alike(asked[0].result(60), short)
    assert steps.ended["modest"] - at <= 1 + 5
    assert_close(asked[0].result().prompt_logprobs, short.prompt_logprobs)


def test_one_token_of_log_probabilities_does_not_wait(make: Make, monkeypatch):
    engine = make(max_rows=8, max_cached_tokens=128)
    steps = Steps(engine, monkeypatch)
    long = ask(engine, LONG, "greedy", max_tokens=120, num_samples=8)
    asked = ask_while(engine, steps, 20, SHORT * 5, max_tokens=1, prompt_logprobs=True)
    assert [len(s.tokens) for s in long.result(60).sequences] == [120] * 8
    assert len(asked[0].result(60).prompt_logprobs or []) == 10
    assert steps.ended["modest"] - 20 <= 1


@pytest.mark.parametrize("samples", [1, 2, 9])
def test_a_tenant_without_rows_gets_some_of_those_that_another_has_filled(
    make: Make, monkeypatch, samples: int
):
    engine = make(max_rows=8)
    alone = ask(engine, LONG, "greedy", max_tokens=60, num_samples=8).result(60)
    short = ask(engine, SHORT, "modest", max_tokens=4, num_samples=samples).result(60)
    steps = Steps(engine, monkeypatch)
    long = ask(engine, LONG, "greedy", max_tokens=60, num_samples=8)
    asked = ask_while(engine, steps, 10, SHORT, max_tokens=4, num_samples=samples)
    assert_alike(long.result(60), alone)
    assert_alike(asked[0].result(60), short)
    rounds = -(-samples // 2)  # a quarter of eight rows at a time
    assert steps.ended["modest"] - 10 <= 5 * rounds
    assert max(steps.rows) == 8


def test_where_memory_runs_out_all_come_to_their_ends_as_if_alone(make: Make, monkeypatch):
    engine = make(max_rows=8, max_cached_tokens=120)
    asks = [([i, 5, i], f"t{i % 3}", {"max_tokens": 12 * (1 + i), "seed": i}) for i in range(8)]
    alone = [ask(engine, p, t, **more).result(60) for p, t, more in asks]
    steps = Steps(engine, monkeypatch)
    loads: list[int] = []
    step = engine._loop.running.batch.step

    def watched(tokens: Any) -> torch.Tensor:
        loads.append(
            CacheUsage.of(
                engine._loop.running.batch.limits, [s.length for s in engine._loop.running.sequences]
            ).tokens
        )
        return step(tokens)

    monkeypatch.setattr(engine._loop.running.batch, "step", watched)
    with engine._inbox.lock:
        pending = [ask(engine, p, t, **more) for p, t, more in asks]
    for future, expected in zip(pending, alone, strict=True):
        assert_alike(future.result(120), expected)
    assert max(loads) <= 120
    assert max(steps.rows) == 8 and steps.rows != sorted(
        steps.rows, reverse=True
    )  # some were paused, and went on
    # Together they take fewer steps than one after the other, whatever is read again.
    assert len(steps.rows) < sum(12 * (1 + i) for i in range(8)) / 2


def test_the_first_of_many_is_never_paused(make: Make, monkeypatch):
    engine = make(max_rows=4, max_cached_tokens=128)
    first = ask(engine, LONG, "t0", max_tokens=110)
    steps = Steps(engine, monkeypatch)
    steps.note("first", first)
    others = [ask(engine, [i], f"t{i}", max_tokens=90) for i in range(1, 6)]
    first.result(60)
    assert steps.ended["first"] <= 110
    for other in others:
        assert len(other.result(120).sequences[0].tokens) == 90


def test_what_does_not_fit_even_alone_is_refused_by_name(make: Make):
    engine = make(max_rows=2, max_cached_tokens=100)
    with pytest.raises(InvalidRequest, match="prompt: 101 tokens; the sampler's memory holds 100"):
        ask(engine, [1] * 101, "t", max_tokens=1).result(10)
    assert len(ask(engine, [1] * 60, "t", max_tokens=200).result(60).sequences[0].tokens) == 40
    full = ask(engine, [1] * 100, "t", max_tokens=9, prompt_logprobs=True).result(60)
    assert len(full.sequences[0].tokens) == 1 and len(full.prompt_logprobs or []) == 100


def test_paused_samples_are_cancelled_with_the_others(make: Make, monkeypatch):
    engine = make(max_rows=8, max_cached_tokens=128)
    steps = Steps(engine, monkeypatch)
    paused: list[int] = []

    def cancel() -> None:
        paused.append(4 - len(engine._loop.running.sequences))
        engine.cancel("doomed")

    steps.then[60] = cancel
    doomed = ask(engine, LONG, "greedy", max_tokens=120, num_samples=4, request_id="doomed")
    with pytest.raises(CancelledError):
        doomed.result(60)
    assert len(ask(engine, SHORT, "t", max_tokens=3).result(60).sequences[0].tokens) == 3
    assert paused[0] > 0 and not engine._loop.waiting and len(steps.rows) == 61 + 2


@pytest.mark.parametrize("end", ["step", "read"])
def test_running_out_of_memory_fails_nobody_who_fits_alone(make: Make, monkeypatch, end: str):
    engine = make(max_rows=8)
    asks = [([i, 5, i], {"max_tokens": 12 + i, "seed": i, "num_samples": 2}) for i in range(4)]
    alone = [ask(engine, p, "t", **more).result(60) for p, more in asks]

    def is_too_much(_cache: Any, _rows: Any, tokens: torch.Tensor, _starts: Any) -> bool:
        """Steps of more than three rows; prompts beside any other."""
        if end == "step":
            return tokens.shape[1] == 1 and len(tokens) > 3
        return tokens.shape[1] > 1 and (len(tokens) > 1 or bool(engine._loop.running.sequences))

    failed = fail_when(monkeypatch, engine._runner, "forward", is_too_much)
    with engine._inbox.lock:
        pending = [ask(engine, p, "t", **more) for p, more in asks]
    for future, expected in zip(pending, alone, strict=True):
        assert_alike(future.result(60), expected)
    assert failed


def test_what_needs_more_memory_than_there_is_fails_alone(make: Make, monkeypatch):
    engine = make(max_rows=8)
    fail_when(monkeypatch, engine._runner, "forward", lambda _c, _r, _t, starts: max(starts) > 40)
    doomed = ask(engine, LONG, "t", max_tokens=60)
    fine = [ask(engine, [i], "u", max_tokens=20) for i in range(4)]
    with pytest.raises(torch.OutOfMemoryError):
        doomed.result(60)
    assert [len(one.result(60).sequences[0].tokens) for one in fine] == [20] * 4


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_cache_that_can_not_grow_is_as_it_was(make: Make, monkeypatch, nth: int):
    """The nth of the allocations fails by which keys and values of each layer grow, and later ones succeed."""
    engine = make(max_rows=8)
    asks = [([3 + i] * (2 + i), {"max_tokens": 100, "seed": i}) for i in range(3)]
    alone = [ask(engine, p, "t", **more).result(60) for p, more in asks]
    calls: list[int] = []

    def is_nth(_: Any, old: torch.Tensor, shape: tuple[int, ...]) -> bool:
        return shape != old.shape and (calls.append(1) or len(calls) == nth)

    failed = fail_when(monkeypatch, memory.CacheMemory, "grown", is_nth)
    with engine._inbox.lock:
        pending = [ask(engine, p, "t", **more) for p, more in asks]
    for future, expected in zip(pending, alone, strict=True):
        assert_alike(future.result(60), expected)
    assert failed == [1]


def test_linear_attention_serves_others_between(linear_model_dir: Path, monkeypatch):
    config = ModelConfig(linear_model_dir)
    engine = TransformersEngine(TransformersBackend(config).loaded, config, max_rows=8)
    try:
        alone = ask(engine, LONG, "greedy", max_tokens=40, num_samples=8, adapter=None).result(60)
        short = ask(engine, SHORT, "modest", max_tokens=4, num_samples=2, adapter=None).result(60)
        steps = Steps(engine, monkeypatch)
        long = ask(engine, LONG, "greedy", max_tokens=40, num_samples=8, adapter=None)
        asked = ask_while(engine, steps, 10, SHORT, max_tokens=4, num_samples=2, adapter=None)
        assert_alike(long.result(60), alone)
        assert_alike(asked[0].result(60), short)
        assert steps.ended["modest"] - 10 <= 1 + 4
    finally:
        engine.close()


def test_a_step_that_fails_in_one_group_leaves_linear_attention_as_it_was(
    linear_model_dir: Path, monkeypatch
):
    config = ModelConfig(linear_model_dir)
    engine = TransformersEngine(TransformersBackend(config).loaded, config, max_rows=8)
    try:
        asks = [([i] * (3 + i), {"max_tokens": 20, "seed": i, "adapter": None}) for i in range(3)]
        alone = [ask(engine, p, "t", **more).result(60) for p, more in asks]
        calls: list[int] = []
        # The second group's fifth step.
        failed = fail_when(
            monkeypatch,
            engine._runner,
            "body",
            lambda tokens, *_: tokens.shape[1] == 1 and (calls.append(1) or len(calls) == 14),
        )
        with engine._inbox.lock:
            pending = [ask(engine, p, "t", **more) for p, more in asks]
        for future, expected in zip(pending, alone, strict=True):
            assert_alike(future.result(60), expected)
        assert failed == [1]
    finally:
        engine.close()
