"""The bytes of the sampler's caches: never more than its part of the memory, and nobody fails who fits alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running_out import fail_when

from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.hf.device_memory import MemoryAccount
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.cache_usage import RowCost
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine, cache, next_tokens
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.layer_kinds import LayerKinds, Span
from twinkle.server.samplers.transformers.limits import make_limits
from twinkle.server.samplers.transformers.memory import CacheFull, CacheMemory

KINDS = LayerKinds(
    {"full_attention": Span(), "sliding_attention": Span(window=70)},
    {0: "full_attention", 1: "sliding_attention"},
    frozenset({2}),
)
HEADS, SIZE = 2, 4


def write(slots: SlotCache, row: int, value: float) -> None:
    """A token at position 0 of a row, in all layers."""
    slots.begin(slice(row, row + 1), torch.zeros(1, 1, dtype=torch.int64), 1)
    for layer in (0, 1):
        own = torch.full((1, HEADS, 1, SIZE), value)
        slots.update(own, own + 0.5, layer)
    slots.update_recurrent_state(torch.full((1, 3), value), 2)


def held(slots: SlotCache) -> list[torch.Tensor]:
    return [*slots._keys_values.values(), *slots._states.values()]


@settings(max_examples=80, deadline=None)
@given(
    limit=st.integers(20_000, 2_000_000),
    wishes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 400), st.booleans()), max_size=12),
)
def test_growing_never_takes_more_and_loses_nothing(limit: int, wishes: list[tuple[int, int, bool]]) -> None:
    memory = CacheMemory(limit)
    slots = SlotCache(KINDS, memory)
    rows = 0
    for wanted, length, trims in wishes:
        before = slots._capacity
        try:
            slots.reserve(wanted, length)
        except CacheFull:
            assert slots._capacity == before
            # It wouldn't fit without what is spare, either: keys and values of two layers (as if none had a window),
            # a state, and the old one of a tensor beside the new one.
            most_rows, most_length = max(wanted, before[0]), max(-(-length // 64) * 64, before[1])
            needed = 4 * most_rows * (2 * 2 * HEADS * most_length * SIZE + 3)
            assert needed + max((tensor.nbytes for tensor in held(slots)), default=0) > limit
        else:
            for row in range(rows, wanted):
                with contextlib.suppress(CacheFull):
                    write(slots, row, float(row + 1))
                    rows = row + 1
        if trims and rows:
            slots.trim(rows, 1)
        assert memory.taken == sum(tensor.nbytes for tensor in held(slots)) <= limit
        for row in range(rows):
            kept = slots.row(row, 1)
            for (kind, *_), tensor in (*kept.keys_values.items(), *kept.states.items()):
                assert (tensor == row + 1 + (0.5 if kind == "values" else 0)).all()
    slots.clear()
    assert memory.taken == 0


def test_a_tensor_that_can_not_be_allocated_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CacheMemory(10**6)
    slots = SlotCache(KINDS, memory)
    slots.reserve(2, 10)
    write(slots, 0, 1.0)
    taken = memory.taken

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "new_zeros", fail)
    with pytest.raises(torch.OutOfMemoryError):
        slots.reserve(4, 100)
    assert memory.taken == taken


@pytest.mark.parametrize("gigabytes", [1, 16, 40])
def test_a_cache_at_its_bound_is_in_the_samplers_part_of_a_gpu(
    backend: TransformersBackend, gigabytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-4B's: 36 layers of 8 heads of 128, keys and values, in 2 bytes; a context of 40,960 tokens."""
    cost = RowCost(36 * 8 * 128 * 2 * 2)
    assert cost.growing == 147_456
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabytes * 10**9, 141 * 10**9))
    memory = MemoryAccount.of(ModelConfig(Path("model"), device="cuda"), torch.device("cuda"))
    loaded = replace(
        backend.loaded, memory=memory, info=replace(backend.loaded.info, max_context_length=40_960)
    )
    limits = make_limits(loaded, 256, None, cost)
    in_tokens = (limits.tokens * 1.25 + limits.prefix_tokens) * cost.growing  # short ones are a quarter more
    assert limits.bytes + limits.prefix_tokens * cost.growing <= memory.sampling
    assert max(in_tokens, 2 * limits.longest * cost.growing) <= memory.sampling
    assert memory.sampling <= 0.3 * gigabytes * 10**9


# ---------------------------------------------------------------- engines that lack memory


def ask(engine: TransformersEngine, prompt: list[int], seed: int, **more: Any) -> Future[SampleResponse]:
    params = SamplingParams(max_tokens=more.pop("max_tokens"), stop=[], seed=seed, temperature=1.2)
    return engine.generate(GenerateRequest(f"t{seed % 3}", None, np.array(prompt), params, **more))


def all_of(futures: list[Future[SampleResponse]]) -> list[list[tuple[list[int], list[float]]]]:
    found = [future.result(120).sequences for future in futures]
    return [[(list(one.tokens), list(one.logprobs or [])) for one in sequences] for sequences in found]


def assert_alike(found: list[Any], expected: list[Any]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for (tokens, logprobs), (wanted, their_logprobs) in zip(mine, theirs, strict=True):
            assert tokens == wanted
            np.testing.assert_allclose(logprobs, their_logprobs, atol=1e-4)


@pytest.fixture
def engine(backend: TransformersBackend, tiny_model_dir: Path) -> Any:
    made = TransformersEngine(backend.loaded, ModelConfig(tiny_model_dir), max_rows=8)
    yield made
    made.close()


def test_an_engine_in_little_memory_gives_the_same_and_stays_in_it(
    engine: TransformersEngine, backend: TransformersBackend, tiny_model_dir: Path
) -> None:
    asks = [([3 + i % 50] * (50 + 5 * i), {"max_tokens": 30, "num_samples": 1 + i % 3}) for i in range(12)]
    expected = all_of([ask(engine, prompt, i, **more) for i, (prompt, more) in enumerate(asks)])
    token = engine._limits.cost.growing
    account = MemoryAccount(0, 0, 2 * 3000 * token)
    small = TransformersEngine(
        replace(backend.loaded, memory=account), ModelConfig(tiny_model_dir), max_rows=8
    )
    try:
        most: list[int] = []
        memory = small._loop.running.batch._memory  # pyright: ignore[reportAttributeAccessIssue]
        take = memory.take

        def noting(size: int) -> None:
            take(size)
            most.append(memory.taken)

        memory.take = noting
        assert 120 < small._limits.longest < 256
        found = all_of([ask(small, prompt, i, **more) for i, (prompt, more) in enumerate(asks)])
        longest = ask(small, [5] * (small._limits.longest - 1), 0, max_tokens=8).result(120)
        assert longest.sequences[0].tokens
    finally:
        small.close()
    assert_alike(found, expected)
    assert 1000 * token < max(most) <= small._limits.bytes <= account.sampling


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_sample_that_can_not_go_on_beside_prompts_makes_them_wait(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [([9, 8], {"max_tokens": 200}), *(([3 + i] * 200, {"max_tokens": 3}) for i in range(6))]
    expected = all_of([ask(engine, prompt, i, **more) for i, (prompt, more) in enumerate(asks)])
    running = engine._loop.running

    def is_too_much(_c: Any, _r: Any, tokens: torch.Tensor, _s: Any) -> bool:
        return tokens.shape[1] == 1 and bool(running.prefilling)

    wait_until(lambda: not running)  # a result is there before its sample has left the batch
    failed = fail_when(monkeypatch, engine._runner, "forward", is_too_much)
    (prompt, more), *others = asks
    pending = [ask(engine, prompt, 0, **more)]
    wait_until(lambda: bool(running.sequences))
    with engine._inbox.lock:
        pending += [ask(engine, prompt, i, **more) for i, (prompt, more) in enumerate(others, start=1)]
    assert_alike(all_of(pending), expected)
    assert failed


def test_samples_of_one_request_that_do_not_fit_together_are_drawn_one_after_the_other(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_of([ask(engine, [4, 5, 6], 1, max_tokens=6, num_samples=5, prompt_logprobs=True)])
    failed = fail_when(monkeypatch, cache.SlotCache, "reserve", lambda _, rows, length: rows > 2)
    found = all_of([ask(engine, [4, 5, 6], 1, max_tokens=6, num_samples=5, prompt_logprobs=True)])
    assert_alike(found, expected)
    assert failed


def test_tokens_that_can_not_be_drawn_together_are_drawn_in_parts(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [([4 + i], {"max_tokens": 6, "topk_sample_logprobs": i}) for i in range(5)]
    expected = all_of([ask(engine, prompt, i, **more) for i, (prompt, more) in enumerate(asks)])
    failed = fail_when(monkeypatch, next_tokens, "draw", lambda logprobs, *_: len(logprobs) > 2)
    with engine._inbox.lock:
        pending = [ask(engine, prompt, i, **more) for i, (prompt, more) in enumerate(asks)]
    assert_alike(all_of(pending), expected)
    assert failed
