"""The engine against Transformers' own `generate` and PEFT."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_contract import ask, greedy, plain_logprobs
from transformers import AutoModelForCausalLM

from twinkle.protocol.errors import ServerFault
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.transformers import TransformersEngine


def test_a_sequence_that_just_fills_the_cache_may_change_places(engine, references):
    # The cache grows by 64 positions; the longer one stands in the last row, with 64 of them, when the first one ends.
    short, long = list(range(10)), list(range(60))
    futures = [ask(engine, p, temperature=0, max_tokens=n, stop=[]) for p, n in ((short, 5), (long, 12))]
    for (prompt, count), future in zip(((short, 5), (long, 12)), futures, strict=True):
        assert future.result(60).sequences[0].tokens == greedy(references[None], prompt, count)


def test_the_engine_goes_on_after_a_failure_that_nobody_foresaw(engine, references, monkeypatch):
    def broken(rows, known):
        raise RuntimeError("the batch is in pieces")

    monkeypatch.setattr(engine._loop.running.batch, "drop", broken)
    done, running = [ask(engine, [1, 2, 3], max_tokens=n, stop=[]) for n in (2, 200)]
    assert len(done.result(60).sequences[0].tokens) == 2  # it was complete before
    with pytest.raises(RuntimeError, match="in pieces"):
        running.result(60)
    after = ask(engine, [1, 2, 3], temperature=0, max_tokens=5, stop=[]).result(60)
    assert after.sequences[0].tokens == greedy(references[None], [1, 2, 3], 5)


def test_a_device_that_fails_for_good_is_told_to_everybody(engine, monkeypatch: pytest.MonkeyPatch):
    """Also to free its memory fails then; a thread that ended of that would leave all who come waiting for ever."""

    def dead(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(engine._runner, "forward", dead)
    monkeypatch.setattr(engine._loop, "_free_memory", dead)
    monkeypatch.setattr(engine._loop, "_make_batch", dead)
    for _ in range(2):
        futures = [ask(engine, prompt, max_tokens=3) for prompt in ([1, 2], [3])]
        for future in futures:
            with pytest.raises(RuntimeError, match="CUDA error"):
                future.result(timeout=60)


def test_an_error_in_one_prompt_leaves_the_others(engine, monkeypatch: pytest.MonkeyPatch):
    forward = engine._runner.forward

    def explosive(cache, rows, tokens, starts):
        if tokens.shape[1] > 1 and (tokens[:, 0] == 7).any():  # a prompt, and not a sampled token
            raise MemoryError("too much")
        return forward(cache, rows, tokens, starts)

    monkeypatch.setattr(engine._runner, "forward", explosive)
    pending = [ask(engine, [token, 1], num_samples=2, max_tokens=4, stop=[]) for token in (5, 7, 6, 7, 8)]
    for token, future in zip((5, 7, 6, 7, 8), pending, strict=True):
        if token == 7:
            with pytest.raises(MemoryError):
                future.result(60)
        else:
            assert [len(s.tokens) for s in future.result(60).sequences] == [4, 4]


def test_an_error_in_a_draw_does_not_end_the_engine(engine, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr("twinkle.server.samplers.transformers.next_tokens.draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(engine, [1, 2], max_tokens=3, stop=[]).result(60)
    assert len(ask(engine, [1, 2], max_tokens=3, stop=[]).result(60).sequences[0].tokens) == 3


class Gate:
    """Holds the engine before each of its steps until it is let through."""

    def __init__(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []  # of each step so far
        self._arrived, self._opened = threading.Semaphore(0), threading.Semaphore(0)
        self._is_open = False
        step = engine._loop.running.batch.step

        def gated(tokens: Sequence[int]) -> torch.Tensor:
            self._arrived.release()
            if not self._is_open:
                assert self._opened.acquire(timeout=60)
            self.rows.append(len(tokens))
            return step(tokens)

        monkeypatch.setattr(engine._loop.running.batch, "step", gated)

    def wait_for_step(self) -> None:
        """Until the engine stands before a step that nobody waited for yet."""
        assert self._arrived.acquire(timeout=60)

    def let_one_through(self) -> None:
        self._opened.release()

    def open(self) -> None:
        self._is_open = True
        self._opened.release()


def test_cancelling_one_that_runs_frees_its_rows_and_leaves_the_others_as_they_are(
    engine, monkeypatch: pytest.MonkeyPatch
):
    def long() -> Any:
        # So few tokens that it doesn't wait for company.
        return ask(engine, [1, 2, 3], "small", seed=42, num_samples=2, max_tokens=7, stop=[])

    alone = long().result(60).sequences
    gate = Gate(engine, monkeypatch)
    doomed = ask(engine, [4] * 9, "other", max_tokens=200, num_samples=3, stop=[], request_id="doomed")
    gate.wait_for_step()
    going_on = long()
    gate.let_one_through()
    gate.wait_for_step()
    engine.cancel("doomed")
    gate.open()
    with pytest.raises(CancelledError):
        doomed.result(60)
    for sequence, expected in zip(going_on.result(60).sequences, alone, strict=True):
        assert sequence.tokens == expected.tokens
        np.testing.assert_allclose(sequence.logprobs, expected.logprobs, atol=1e-4)
    # The step that was under way was the last with its rows.
    assert gate.rows[:2] == [3, 5] and set(gate.rows[2:]) == {2}
    assert not engine._loop.cancellable


@pytest.mark.parametrize(
    ("max_tokens", "steps"),
    [(40, 5), (90, 8), (7, 0)],  # an eighth of its own, at most eight
)
def test_prompts_that_come_while_others_generate_are_read_together_when_the_first_is_due(
    engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int, steps: int
):
    def short(seed: int) -> Any:
        return ask(engine, [1, 2, seed], "small", seed=seed, max_tokens=max_tokens, stop=[])

    alone = [short(seed).result(60).sequences[0].tokens for seed in (5, 6)]
    gate = Gate(engine, monkeypatch)
    running = ask(engine, [4] * 9, "other", max_tokens=200, stop=[], request_id="running")
    gate.wait_for_step()
    first, second = short(5), short(6)
    gate.let_one_through()  # the step that was under way when they came counts
    for _ in range(max(1, steps) - 1):
        gate.wait_for_step()
        gate.let_one_through()
    gate.wait_for_step()
    gate.open()
    assert [each.result(60).sequences[0].tokens for each in (first, second)] == alone
    running.result(60)
    expected = max(1, steps)
    assert gate.rows[: expected + 1] == [1] * expected + [3]


def test_one_that_waits_for_company_begins_at_once_when_the_others_have_ended(
    engine, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(engine, monkeypatch)
    running = ask(engine, [4] * 9, "other", max_tokens=3, stop=[])
    gate.wait_for_step()
    waiting = ask(engine, [1, 2], "small", max_tokens=64, stop=[])
    gate.open()
    assert len(running.result(60).sequences[0].tokens) == 3
    assert len(waiting.result(60).sequences[0].tokens) == 64
    assert gate.rows == [1] * (2 + 63)


def test_cancelling_one_that_waits_takes_it_out_of_the_line(
    backend, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = TransformersEngine(backend.loaded, ModelConfig(tiny_model_dir), max_rows=1)
    try:
        gate = Gate(engine, monkeypatch)
        running = ask(engine, [1, 2], max_tokens=10, stop=[], request_id="running")
        gate.wait_for_step()
        waiting = ask(engine, [3, 4], max_tokens=10, stop=[], request_id="waiting")
        behind = ask(engine, [5, 6], max_tokens=10, stop=[], request_id="behind")
        engine.cancel("waiting")
        gate.open()
        with pytest.raises(CancelledError):
            waiting.result(60)
        assert len(running.result(60).sequences[0].tokens) == 10
        assert len(behind.result(60).sequences[0].tokens) == 10
        assert gate.rows == [1] * 18  # two requests, each of whose first tokens came without a step
    finally:
        engine.close()


def test_a_request_that_has_begun_in_part_is_cancelled_whole(engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(engine, monkeypatch)
    many = ask(engine, [1], max_tokens=50, num_samples=30, stop=[], request_id="many")
    gate.wait_for_step()
    engine.cancel("many")
    gate.open()
    with pytest.raises(CancelledError):
        many.result(60)
    assert len(ask(engine, [1], max_tokens=3, num_samples=8, stop=[]).result(60).sequences) == 8
    assert gate.rows == [8, 8, 8]  # one with the cancelled samples, two without
    assert not engine._loop.waiting


def test_ids_that_are_unknown_empty_or_done_cancel_nothing(engine, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(engine, monkeypatch)
    engine.cancel("later")
    done = ask(engine, [1], max_tokens=1, stop=[], request_id="done").result(60)
    pending = [ask(engine, [2], max_tokens=5, stop=[], request_id=name) for name in ("", "later", "")]
    gate.wait_for_step()
    for request_id in ("", "done", "unknown"):
        engine.cancel(request_id)
    gate.open()
    assert [len(future.result(60).sequences[0].tokens) for future in pending] == [5, 5, 5]
    assert len(done.sequences[0].tokens) == 1


def test_closing_cancels_what_is_not_done(backend, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    engine = TransformersEngine(backend.loaded, ModelConfig(tiny_model_dir), max_rows=2)
    gate = Gate(engine, monkeypatch)
    pending = [ask(engine, [1], max_tokens=200, stop=[]) for _ in range(20)]
    gate.wait_for_step()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._inbox.is_closed:
        time.sleep(0.001)
    gate.open()
    closing.join(60)
    assert [type(future.exception(10)) for future in pending] == [CancelledError] * 20
    late = ask(engine, [1], max_tokens=1)
    assert isinstance(late.exception(10), ServerFault)
    engine.cancel("unknown")  # harmless
    engine.close()


def test_a_model_with_linear_attention_is_sampled_as_generate_does(linear_model_dir: Path):
    model_config = ModelConfig(linear_model_dir)
    backend = TransformersBackend(model_config)
    engine = TransformersEngine.create(model_config, backend)
    reference = AutoModelForCausalLM.from_pretrained(linear_model_dir, dtype=torch.float32).eval()
    cases = [[5, 6, 7], [9] * 12, [3]]
    pending = [
        ask(engine, p, temperature=0, max_tokens=8, num_samples=2, stop=[], prompt_logprobs=True)
        for p in cases
    ]
    for prompt, future in zip(cases, pending, strict=True):
        expected = greedy(reference, prompt, 8)
        response = future.result(60)
        assert [s.tokens for s in response.sequences] == [expected, expected]
        plain = plain_logprobs(reference, prompt)
        np.testing.assert_allclose(
            response.prompt_logprobs[1:], [plain[i, t].item() for i, t in enumerate(prompt[1:])], atol=1e-4
        )
    engine.close()


def test_cancelling_works_for_a_model_with_linear_attention(
    linear_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    config = ModelConfig(linear_model_dir)
    engine = TransformersEngine.create(config, TransformersBackend(config))
    try:
        gate = Gate(engine, monkeypatch)
        doomed = ask(engine, [5, 6], max_tokens=50, num_samples=2, stop=[], request_id="doomed")
        gate.wait_for_step()
        behind = ask(engine, [7], max_tokens=4, stop=[])
        engine.cancel("doomed")
        gate.open()
        with pytest.raises(CancelledError):
            doomed.result(60)
        assert len(behind.result(60).sequences[0].tokens) == 4
        assert gate.rows == [2, 1, 1, 1]
    finally:
        engine.close()
