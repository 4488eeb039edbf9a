"""Draws against closed forms and frequencies."""

import numpy as np
import pytest
import torch

from twinkle.server.samplers.transformers import draw as draw_module
from twinkle.server.samplers.transformers.draw import (
    DrawSettings,
    Uniforms,
    alternatives_generator,
    draw,
    draw_alternatives,
    tempered_logprobs,
)

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


def settings(rows: int, temperature: float = 1.0, top_k: int = 5, top_p: float = 1.0) -> DrawSettings:
    return DrawSettings(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p),
        filtered=top_k < 5 or top_p < 1,
    )


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
    logprobs = tempered_logprobs(logits, torch.tensor([0.5, 0.0]))
    expected = torch.log_softmax(logits[0] / 0.5, -1)
    torch.testing.assert_close(logprobs[0], expected)
    torch.testing.assert_close(logprobs[1], torch.log_softmax(logits[1], -1))


def test_a_temperature_next_to_nothing_is_as_good_as_greedy():
    logits = torch.tensor([[1.0, 30.0, -4.0]])
    logprobs = tempered_logprobs(logits, torch.tensor([1e-38]))
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
    assert draw(logprobs, settings(1, top_k=3), torch.tensor([1 - 1e-17], dtype=torch.float64)).item() == 1


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
