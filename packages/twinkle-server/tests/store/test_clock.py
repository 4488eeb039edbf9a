"""When a wall clock is believed."""

from __future__ import annotations

import pytest

from twinkle.server.store.clock import STEADY_SECONDS, SteadyClock

YEAR, DAY = 365 * 86_400.0, 86_400.0


class Clocks:
    """A machine's two clocks: `pass_time` moves both, a leap the wall clock alone."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1_800_000_000.0, 5.0
        self.steady = SteadyClock(lambda: self.wall, lambda: self.monotonic)

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_a_clock_is_believed_when_it_has_run_for_a_while(clocks: Clocks):
    assert clocks.steady.now() is None
    clocks.pass_time(STEADY_SECONDS - 1)
    assert clocks.steady.now() is None
    clocks.pass_time(1)
    assert clocks.steady.now() == 1_800_000_000 + STEADY_SECONDS


@pytest.mark.parametrize("leap", [YEAR, -DAY, 61.0, -61.0])
def test_after_a_leap_it_is_not_believed_until_it_was_steady_again(
    clocks: Clocks, leap: float, caplog: pytest.LogCaptureFixture
):
    clocks.pass_time(STEADY_SECONDS)
    assert clocks.steady.now() is not None
    clocks.wall += leap
    for _ in range(int(STEADY_SECONDS / 60)):
        assert clocks.steady.now() is None
        clocks.pass_time(60)
    assert clocks.steady.now() == clocks.wall
    [said] = [record.getMessage() for record in caplog.records]
    assert f"leapt {'forward' if leap > 0 else 'back'} by {abs(leap):.0f} s" in said


def test_a_clock_that_is_set_right_again_has_leapt_twice(clocks: Clocks):
    clocks.pass_time(STEADY_SECONDS)
    clocks.wall += YEAR
    assert clocks.steady.now() is None
    clocks.pass_time(STEADY_SECONDS / 2)
    clocks.wall -= YEAR
    assert clocks.steady.now() is None
    clocks.pass_time(STEADY_SECONDS - 1)
    assert clocks.steady.now() is None
    clocks.pass_time(1)
    assert clocks.steady.now() == 1_800_000_000 + 2.5 * STEADY_SECONDS


def test_that_it_has_leapt_is_known_for_an_hour_and_a_start_is_none(clocks: Clocks):
    assert not clocks.steady.has_leapt()
    clocks.wall += YEAR
    assert clocks.steady.has_leapt()
    clocks.pass_time(STEADY_SECONDS - 1)
    assert clocks.steady.has_leapt()
    clocks.pass_time(1)
    assert not clocks.steady.has_leapt()


def test_slewing_is_no_leap(clocks: Clocks):
    clocks.pass_time(STEADY_SECONDS)
    for _ in range(1000):
        clocks.pass_time(60)
        clocks.wall += 0.03  # 500 parts in a million, as much as Linux slews
        assert clocks.steady.now() == clocks.wall
