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
from transformers import AutoModelForCausalLM

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

VOCAB = 512


def ask(engine: TransformersEngine, prompt, adapter: str | None = None, tenant: str = "t", **more) -> Any:
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


def test_a_stop_string_is_found_across_tokens(engine, tiny_model_dir: Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    # Tokens of this model are single bytes: search a sampled text for two neighbours that are plain letters.
    for seed in range(200):
        free = ask(engine, [65], seed=seed, temperature=1.0, max_tokens=60, stop=[]).result(60).sequences[0]
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


def test_the_end_of_text_token_stops_unless_stops_are_given(backend, tiny_model_dir: Path, engine):
    [eos] = backend.info.eos_token_ids
    for seed in range(400):
        free = ask(engine, [9], seed=seed, temperature=2.0, max_tokens=100, stop=[]).result(60).sequences[0]
        if eos in free.tokens[:-1]:
            ended = ask(engine, [9], seed=seed, temperature=2.0, max_tokens=100).result(60).sequences[0]
            assert ended.tokens == free.tokens[: free.tokens.index(eos) + 1]
            assert ended.stop_reason == "stop"
            return
    raise AssertionError("no end of text in 400 samples")


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


def test_what_cannot_be_fails_alone(engine):
    good = ask(engine, [1, 2], max_tokens=20, stop=[])
    with pytest.raises(NotFound, match="'nobody'"):
        ask(engine, [1, 2], "nobody").result(10)
    with pytest.raises(InvalidRequest, match="257 tokens"):
        ask(engine, [1] * 257).result(10)
    assert len(good.result(60).sequences[0].tokens) == 20


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
    assert not engine._loop.cancellable


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


def test_a_model_with_linear_attention_takes_the_plain_way(linear_model_dir: Path):
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
