"""How long prompts wait for company."""

import pytest

from twinkle.server.samplers.transformers.prefill_delay import PrefillDelay


def steps_until_expired(delay: PrefillDelay) -> int:
    steps = 0
    while not delay.has_expired:
        delay.stepped()
        steps += 1
    return steps


@pytest.mark.parametrize(
    ("max_tokens", "steps"), [(1, 0), (7, 0), (8, 1), (63, 7), (64, 8), (65, 8), (4096, 8)]
)
def test_a_prompt_waits_an_eighth_of_its_own_steps_at_most_eight(max_tokens: int, steps: int):
    delay = PrefillDelay(enough_tokens=512)
    delay.added(10, max_tokens)
    assert steps_until_expired(delay) == steps


def test_the_first_that_is_due_takes_all_along():
    delay = PrefillDelay(enough_tokens=512)
    delay.added(10, 64)
    delay.stepped()
    delay.added(10, 16)
    assert steps_until_expired(delay) == 2
    delay.admitted(all_of_them=True)
    assert not delay.has_expired


def test_a_full_pass_waits_for_nobody():
    delay = PrefillDelay(enough_tokens=512)
    delay.added(500, 64)
    assert not delay.has_expired
    delay.added(12, 64)
    assert delay.has_expired


def test_who_found_no_room_comes_as_soon_as_there_is_some():
    delay = PrefillDelay(enough_tokens=512)
    delay.added(600, 64)
    delay.admitted(all_of_them=False)
    assert delay.has_expired
    delay.admitted(all_of_them=True)
    assert not delay.has_expired


def test_nobody_waits_at_first():
    assert not PrefillDelay(enough_tokens=0).has_expired
