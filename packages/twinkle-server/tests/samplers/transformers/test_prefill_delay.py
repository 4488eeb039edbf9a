"""How long prompts wait for company."""

import pytest

from twinkle.server.samplers.transformers.prefill_delay import Patience


def steps_until_over(patience: Patience) -> int:
    steps = 0
    while not patience.is_over:
        patience.stepped()
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("max_tokens", "steps"), [(1, 0), (7, 0), (8, 1), (63, 7), (64, 8), (65, 8), (4096, 8)]
)
def test_a_prompt_waits_an_eighth_of_its_own_steps_at_most_eight(max_tokens: int, steps: int):
    patience = Patience(enough_tokens=512)
    patience.arrived(10, max_tokens)
    assert steps_until_over(patience) == steps


def test_the_first_that_is_due_takes_all_along():
    patience = Patience(enough_tokens=512)
    patience.arrived(10, 64)
    patience.stepped()
    patience.arrived(10, 16)
    assert steps_until_over(patience) == 2
    patience.admitted(all_of_them=True)
    assert not patience.is_over


def test_a_full_pass_waits_for_nobody():
    patience = Patience(enough_tokens=512)
    patience.arrived(500, 64)
    assert not patience.is_over
    patience.arrived(12, 64)
    assert patience.is_over


def test_who_found_no_room_comes_as_soon_as_there_is_some():
    patience = Patience(enough_tokens=512)
    patience.arrived(600, 64)
    patience.admitted(all_of_them=False)
    assert patience.is_over
    patience.admitted(all_of_them=True)
    assert not patience.is_over


def test_nobody_waits_at_first():
    assert not Patience(enough_tokens=0).is_over
