"""Each loss in torch, with autograd, against its closed form in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.server.backends.lora.losses.formulas import FORMULAS, LOSS_SPECS
from twinkle.server.backends.lora.losses.functions import LOSSES


def as_row(tokens: torch.Tensor) -> torch.Tensor:
    """[tokens] to [1, tokens, 1]."""
    return tokens[None, :, None]


def test_every_loss_has_its_closed_form():
    assert set(FORMULAS) == set(LOSSES) == set(LOSS_SPECS)


@pytest.mark.parametrize("name", FORMULAS)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 12),
    spread=st.sampled_from([0.0, 1e-4, 0.1, 2.0]),
    low=st.sampled_from([0.0, 0.5, 0.8, 0.9997]),
    high=st.sampled_from([1.0004, 1.2, 4.0]),
    beta=st.sampled_from([0.0, 0.05, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_are_those_of_the_formula(
    name: str, seed: int, length: int, spread: float, low: float, high: float, beta: float
):
    draw = np.random.default_rng(seed)
    p = -draw.exponential(size=length)
    inputs = {
        "weights": draw.normal(size=length),
        "advantages": draw.normal(size=length) * draw.integers(0, 2, length),
        "logprobs": p + spread * draw.normal(size=length),
        "sequence_ratio_mask": draw.integers(0, 2, length).astype(float),
    }
    given_config = {"clip_low_threshold": low, "clip_high_threshold": high, "beta": beta}
    config = {key: given_config[key] for key in LOSS_SPECS[name].config}
    expected, expected_grad = FORMULAS[name](p, inputs, config)
    logprobs = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    own_inputs = {k: as_row(torch.tensor(inputs[k])) for k in LOSS_SPECS[name].inputs}
    loss = LOSSES[name](as_row(logprobs), own_inputs, config).sum()
    loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(logprobs.grad.numpy(), expected_grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_a_token_without_advantage_counts_for_nothing_however_unlikely_it_was(name: str):
    inputs = {
        "logprobs": as_row(torch.tensor([-1.0, -500.0])),
        "advantages": as_row(torch.tensor([2.0, 0.0])),
        "sequence_ratio_mask": as_row(torch.tensor([1.0, 0.0])),
    }
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = LOSSES[name](as_row(logprobs), inputs, LOSS_SPECS[name].config).sum()
    loss.backward()
    assert loss.item() == pytest.approx(2.0 if name == "cispo" else -2.0)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-2.0, 0.0])


def test_defaults_are_those_that_are_documented():
    assert LOSS_SPECS["ppo"].config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert LOSS_SPECS["cispo"].config == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    assert LOSS_SPECS["dro"].config == {"beta": 0.05}
    assert LOSS_SPECS["gspo"].config == pytest.approx(
        {"clip_low_threshold": 0.9997, "clip_high_threshold": 1.0004}
    )
