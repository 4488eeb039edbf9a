"""Draws against closed forms and frequencies."""

import numpy as np
import pytest
import torch

from twinkle.server.samplers.transformers.draw import DrawSettings, Uniforms, draw, tempered_logprobs

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
