"""Draws against closed forms and frequencies."""

from typing import Any

import numpy as np
import pytest
import torch

from twinkle.protocol.types import SamplingParams
from twinkle.server.samplers.prompt_answers import alternatives_generator
from twinkle.server.samplers.transformers import draw as draw_module
from twinkle.server.samplers.transformers.draw import (
    DrawSettings,
    Uniforms,
    draw,
    draw_alternatives,
    sums_in_one_order,
    tempered_logprobs,
)

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


def settings(rows: int, **how: Any) -> DrawSettings:
    return DrawSettings.of([SamplingParams(**how)] * rows, 5, torch.device("cpu"))


def many_draws(n: int = 20_000, **how) -> np.ndarray:
    logprobs = torch.tensor(PROBABILITIES).log().repeat(n, 1)
    uniforms = torch.tensor(np.random.default_rng(0).random(n))
    drawn = draw(logprobs, settings(n, **how), uniforms)
    return np.bincount(drawn.numpy(), minlength=5) / n


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        # 0.4 + 0.3 = 0.7 reaches 0.65 with two tokens; 0.71 needs the third.
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [40 / 85, 30 / 85, 15 / 85, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        # top_k first, then top_p among what it left: of 4/7 and 3/7 the first alone reaches 0.5.
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies_are_those_of_the_filtered_distribution(how: dict, expected: list[float]):
    np.testing.assert_allclose(many_draws(**how), expected, atol=0.015)


def test_temperature_sharpens_as_the_softmax_says():
    logits = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    params = [SamplingParams(temperature=0.5), SamplingParams(temperature=0.0)]
    logprobs = tempered_logprobs(logits, DrawSettings.of(params, 3, logits.device))
    expected = torch.log_softmax(logits[0] / 0.5, -1)
    torch.testing.assert_close(logprobs[0], expected)
    torch.testing.assert_close(logprobs[1], torch.log_softmax(logits[1], -1))


def test_a_temperature_next_to_nothing_is_as_good_as_greedy():
    logits = torch.tensor([[1.0, 30.0, -4.0]])
    logprobs = tempered_logprobs(logits, settings(1, temperature=1e-38))
    assert logprobs.exp().tolist() == [[0, 1, 0]]
    uniforms = torch.tensor([[0.0, 0.5, 0.999]], dtype=torch.float64)
    for temperature in (0.0, 1e-38, 1e-60):
        assert draw_alternatives(torch.log_softmax(logits, -1), temperature, uniforms).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_of_alternatives_are_those_of_the_tempered_distribution(temperature: float):
    rows = torch.tensor([PROBABILITIES, PROBABILITIES[::-1]])
    uniforms = torch.from_numpy(alternatives_generator(3).random((2, 20_000)))
    drawn = draw_alternatives(rows.log(), temperature, uniforms)
    for row, tokens in zip(rows.numpy(), drawn.numpy(), strict=True):
        expected = row ** (1 / temperature) / (row ** (1 / temperature)).sum()
        np.testing.assert_allclose(np.bincount(tokens, minlength=5) / 20_000, expected, atol=0.015)


def test_alternatives_are_the_same_however_many_rows_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    logprobs = torch.log_softmax(torch.randn(7, 50, generator=torch.Generator().manual_seed(0)), -1)
    uniforms = torch.from_numpy(alternatives_generator(3).random((7, 4)))
    whole = draw_alternatives(logprobs, 0.8, uniforms)
    for at_once in (1, 3 * 50):
        monkeypatch.setattr(draw_module, "_PROBABILITIES_AT_ONCE", at_once)
        assert draw_alternatives(logprobs, 0.8, uniforms).tolist() == whole.tolist()


def test_a_draw_at_the_very_end_finds_a_token_that_has_a_probability():
    logprobs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    uniforms = torch.tensor([1 - 1e-17], dtype=torch.float64)
    for how in ({}, {"top_k": 3}):
        assert draw(logprobs, settings(1, **how), uniforms).item() == 1


def by_definition(logprobs: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The likeliest first where the choice is narrowed, else in the order of the vocabulary."""
    probabilities = np.exp(logprobs.astype(float))
    order = np.arange(len(probabilities))
    if params.top_k > 0 or params.top_p < 1:
        order = np.argsort(-probabilities)[: params.top_k if params.top_k > 0 else None]
        own = probabilities[order] / probabilities[order].sum()
        order = order[: 1 + int((np.cumsum(own)[:-1] < params.top_p).sum())]
    own = probabilities[order] / probabilities[order].sum()
    return int(order[np.searchsorted(np.cumsum(own), uniform, side="right")])


def test_rows_of_a_large_vocabulary_are_drawn_as_defined_whatever_the_others_ask_for():
    vocab = 1500
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits *= torch.linspace(0.1, 6, 8).unsqueeze(1)  # from nearly even to peaked
    logprobs = torch.log_softmax(logits, -1).float()
    uniforms = torch.from_numpy(np.random.default_rng(0).random(8))
    ways = [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=7),
        SamplingParams(top_k=900, top_p=0.95),
        SamplingParams(top_p=0.2),
    ]
    for shift in range(len(ways)):
        params = [ways[(row + shift) % len(ways)] for row in range(8)]
        tokens = draw(logprobs, DrawSettings.of(params, vocab, logprobs.device), uniforms).tolist()
        expected = [
            by_definition(row, own, uniform)
            for row, own, uniform in zip(logprobs.numpy(), params, uniforms.tolist(), strict=True)
        ]
        assert tokens == expected


def test_logits_that_are_not_numbers_give_some_token_of_the_vocabulary():
    logprobs = torch.full((3, 300), float("nan"))
    params = [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0)]
    uniforms = torch.full((3,), 0.5, dtype=torch.float64)
    tokens = draw(logprobs, DrawSettings.of(params, 300, logprobs.device), uniforms)
    assert ((tokens >= 0) & (tokens < 300)).all()


def test_uniforms_depend_on_seed_and_sample_alone():
    def first(seed: int, sample: int) -> list[float]:
        stream = Uniforms(seed, sample)
        return [stream.next() for _ in range(600)]

    assert first(7, 0) == first(7, 0)
    assert len({first(7, 0)[0], first(7, 1)[0], first(8, 0)[0], first(-7, 0)[0]}) == 4
    values = np.array(first(1, 2))
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.05


def test_alternatives_have_a_stream_of_their_own():
    def block(seed: int) -> list[float]:
        return alternatives_generator(seed).random(50).tolist()

    assert block(7) == block(7) and block(-7) == block(-7)
    streams = [block(7), block(8), block(-7)]
    for sample in range(20):
        stream = Uniforms(7, sample)
        streams.append([stream.next() for _ in range(50)])
    assert len({number for numbers in streams for number in numbers}) == 50 * len(streams)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_sums_in_one_order_are_cumulative(length: int):
    values = np.random.default_rng(length).random((3, length))
    found = sums_in_one_order(torch.from_numpy(values))
    np.testing.assert_allclose(found.numpy(), np.cumsum(values, axis=1), rtol=1e-14)
