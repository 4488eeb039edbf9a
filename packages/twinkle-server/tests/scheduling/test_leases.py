"""Whose client is gone, by its lease."""

from __future__ import annotations

import asyncio

import pytest

from twinkle.server.scheduling.leases import Leases


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ticks(leases: Leases, clock: Clock, seconds: float) -> None:
    for _ in range(int(seconds / 5)):
        clock.now += 5
        leases.tick()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_one_whose_heartbeats_end_is_gone_and_is_back_with_the_next(clock: Clock):
    leases = Leases(25, clock)
    for _ in range(10):
        leases.renew("a", heartbeat=True)
        ticks(leases, clock, 10)
        assert not leases.is_gone("a")
    ticks(leases, clock, 10)
    assert not leases.is_gone("a")
    ticks(leases, clock, 5)
    assert leases.is_gone("a")
    leases.renew("a", heartbeat=True)
    assert not leases.is_gone("a")


def test_one_that_never_waited_for_anything_may_come_at_any_time(clock: Clock):
    leases = Leases(25, clock)
    leases.renew("a")
    ticks(leases, clock, 10_000)
    assert not leases.is_gone("a") and not leases.is_gone("unknown")


def test_one_that_waits_is_there_however_long_that_takes(clock: Clock):
    leases = Leases(25, clock)
    leases.renew("a")
    with leases.waiting(["a"]), leases.waiting(["a"]):
        ticks(leases, clock, 500)
        assert not leases.is_gone("a")
    ticks(leases, clock, 20)
    assert not leases.is_gone("a")
    ticks(leases, clock, 5)
    assert leases.is_gone("a")


def test_one_that_hangs_up_was_there_when_it_began_to_wait(clock: Clock):
    leases = Leases(25, clock)
    leases.renew("a")
    with pytest.raises(asyncio.CancelledError), leases.waiting(["a"]):
        ticks(leases, clock, 25)
        raise asyncio.CancelledError
    assert leases.is_gone("a")


def test_one_that_polls_seldom_is_taken_for_gone_once(clock: Clock):
    leases = Leases(25, clock)
    leases.renew("a")
    gone = []
    for _ in range(5):
        with leases.waiting(["a"]):
            pass
        ticks(leases, clock, 60)
        gone.append(leases.is_gone("a"))
    assert gone == [True, False, False, False, False]
    leases.renew("a", heartbeat=True)  # from now on these tell
    ticks(leases, clock, 25)
    assert leases.is_gone("a")


def test_a_server_that_stood_still_takes_nobody_for_gone(clock: Clock):
    leases = Leases(25, clock)
    leases.renew("a", heartbeat=True)
    for _ in range(2):
        clock.now += 3600
        leases.tick()
    assert not leases.is_gone("a")


def test_without_a_limit_nobody_is_gone(clock: Clock):
    leases = Leases(None, clock)
    leases.renew("a", heartbeat=True)
    ticks(leases, clock, 10_000)
    assert not leases.is_gone("a")
