"""Learning rates step by step, in closed form and against Transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from twinkle.protocol.errors import InvalidRequest
from twinkle.schedule import constant, cosine, linear

TOTAL = 20
PEAK = 3e-4


def transformers_rates(make: Callable[..., Any], count: int, **options: int) -> list[float]:
    """Their learning rates at steps 0 to count - 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, **options)
    rates = []
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, TOTAL])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda step, warmup: constant(step, PEAK, warmup), get_constant_schedule_with_warmup),
        (lambda step, warmup: linear(step, TOTAL, PEAK, warmup), get_linear_schedule_with_warmup),
        (lambda step, warmup: cosine(step, TOTAL, PEAK, warmup), get_cosine_schedule_with_warmup),
    ],
)
def test_schedules_are_those_of_transformers_a_step_ahead_in_the_warm_up(
    ours: Callable[[int, int], float], theirs: Callable[..., Any], warmup: int
) -> None:
    total = {} if theirs is get_constant_schedule_with_warmup else {"num_training_steps": TOTAL}
    rates = transformers_rates(theirs, TOTAL + 1, num_warmup_steps=warmup, **total)
    # Where the warm-up is all there is, theirs never comes to its peak: it is at the decay's end by then.
    last = TOTAL - 1 if warmup == TOTAL else TOTAL
    for step in range(last):
        assert ours(step, warmup) == pytest.approx(rates[step + 1 if step < warmup else step], rel=1e-12)
    assert ours(TOTAL - 1, TOTAL) == pytest.approx(PEAK)


@given(st.integers(1, 50), st.data())
def test_rates_stay_between_floor_and_peak_and_never_rise_after_the_warm_up(
    total: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, total))
    for schedule in (linear, cosine):
        rates = [schedule(step, total, 1.0, warmup, floor=0.1) for step in range(total + 5)]
        assert all(0 < rate <= 1 for rate in rates)
        assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
        decay = rates[warmup:]
        assert all(before >= after for before, after in zip(decay, decay[1:], strict=False))
        assert decay[0] == pytest.approx(1.0 if warmup < total else rates[-1])
        assert rates[total:] == pytest.approx([0.1] * 5)


def test_half_way_is_half_way() -> None:
    assert linear(5, 10, 1.0, floor=0.5) == pytest.approx(0.75)
    assert cosine(5, 10, 1.0, floor=0.5) == pytest.approx(0.75)
    assert cosine(2, 8, 1.0) == pytest.approx((1 + 0.5**0.5) / 2)
    assert constant(10**6, 1e-4) == 1e-4


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "step: -1; allowed are whole numbers from 0"),
        ({"step": 0.5}, "step: 0.5"),
        ({"total_steps": 0}, "total_steps: 0; allowed are whole numbers from 1"),
        ({"warmup_steps": -1}, "warmup_steps: -1; allowed are whole numbers from 0"),
        ({"warmup_steps": 11}, "warmup_steps: 11; at most total_steps, which is 10"),
        ({"peak": -1e-4}, "peak: -0.0001; a learning rate is a finite number from 0"),
        ({"peak": float("nan")}, "peak: nan"),
        ({"floor": float("inf")}, "floor: inf"),
        ({"floor": 1.0}, "floor: 1.0; at most the peak, which is 0.1"),
    ],
)
def test_bad_numbers_are_named(schedule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        schedule(**{"step": 0, "total_steps": 10, "peak": 0.1, **options})


def test_constant_names_bad_numbers_too() -> None:
    with pytest.raises(InvalidRequest, match="warmup_steps: -2"):
        constant(0, 0.1, -2)
    with pytest.raises(InvalidRequest, match="step: nan"):
        constant(float("nan"), 0.1)  # pyright: ignore[reportArgumentType]
