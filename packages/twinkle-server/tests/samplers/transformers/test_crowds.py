"""Crowds of mixed requests where there is little room: every sample is what it is alone, and the work is bounded."""

from __future__ import annotations

from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.types import SampleResponse, SamplingParams
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

ADAPTERS = (None, "small", "other", "large")
CONTEXT = 256


def crowd(seed: int, most_tokens: int, count: int) -> list[GenerateRequest]:
    """Requests of four tenants, from one token to all that there is room for."""
    draw = np.random.default_rng(seed)
    requests: list[GenerateRequest] = []
    for number in range(count):
        limit = min(most_tokens, CONTEXT)
        length = int(draw.choice([1, 3, 20, limit // 2, limit - 1, limit]))
        prompt = draw.integers(0, 250, length)
        more: dict[str, Any] = {"num_samples": int(draw.choice([1, 1, 2, 3]))}
        if draw.random() < 0.3:
            more["prompt_logprobs"] = True
        params = SamplingParams(
            max_tokens=int(draw.choice([1, 5, 40, 120])), stop=[], seed=number, temperature=1.2
        )
        tenant, adapter = f"tenant {draw.integers(4)}", ADAPTERS[draw.integers(len(ADAPTERS))]
        requests.append(GenerateRequest(tenant, adapter, prompt, params, request_id=f"r{number}", **more))
    return requests


def assert_alike(found: SampleResponse, alone: SampleResponse) -> None:
    for one, expected in zip(found.sequences, alone.sequences, strict=True):
        assert one.tokens == expected.tokens
        np.testing.assert_allclose(np.array(one.logprobs), np.array(expected.logprobs), atol=1e-4)
    if alone.prompt_logprobs is not None:
        assert found.prompt_logprobs is not None
        np.testing.assert_allclose(
            np.array(found.prompt_logprobs, float), np.array(alone.prompt_logprobs, float), atol=1e-4
        )


@pytest.mark.parametrize(
    ("rows", "tokens"), [(1, 256), (3, 256), (8, 300), (16, 700), (8, 5000)], ids=lambda value: str(value)
)
def test_each_of_a_crowd_is_what_it_is_alone(
    backend: TransformersBackend, tiny_model_dir: Path, states, monkeypatch, rows: int, tokens: int
):
    requests = crowd(seed=rows, most_tokens=tokens, count=14)
    engine = TransformersEngine(
        backend.loaded, ModelConfig(tiny_model_dir), max_rows=rows, max_cached_tokens=tokens
    )
    turns = 0
    turn = engine._loop._turn

    def counted(messages: Any) -> None:
        nonlocal turns
        turns += 1
        turn(messages)

    monkeypatch.setattr(engine._loop, "_turn", counted)
    try:
        for name, state in states.items():
            engine.add_adapter(name, state)
        alone = [engine.generate(request).result(120) for request in requests]
        one_after_the_other, turns = turns, 0
        asked = [engine.generate(request) for request in requests]
        engine.cancel("r4")
        for i, future in enumerate(asked):
            try:
                assert_alike(future.result(120), alone[i])
            except CancelledError:
                assert i == 4
        assert turns <= one_after_the_other + 10
    finally:
        engine.close()
