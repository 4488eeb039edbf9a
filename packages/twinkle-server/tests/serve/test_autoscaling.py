"""How many samplers are wanted, as the load changes: by hand, second by second."""

from __future__ import annotations

import pytest

from twinkle.server.serve.autoscaling import Policy, Scale, next_scale

# From one to four samplers, ten sequences for each.
POLICY = Policy(min_replicas=1, max_replicas=4, target_sequences=10, upscale_delay=2, downscale_delay=4)


@pytest.mark.parametrize(
    ("sequences", "asked"),
    [(0, 1), (1, 1), (10, 1), (11, 2), (20, 2), (21, 3), (40, 4), (41, 4), (10_000, 4)],
)
def test_a_load_asks_for_as_many_as_have_their_target(sequences: int, asked: int):
    assert POLICY.asked(sequences) == asked


def test_there_are_never_fewer_than_the_minimum():
    assert Policy(3, 5, 10, 2, 4).asked(0) == 3


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        # More for two seconds brings as many as were asked for all the time.
        ([25, 25, 25, 25], [1, 1, 3, 3]),
        ([25, 15, 99, 99, 99, 99], [1, 1, 2, 2, 2, 4]),
        # A peak does nothing, and a pause begins the two seconds anew.
        ([0, 99, 99, 0, 99, 99, 99], [1, 1, 1, 1, 1, 1, 4]),
        # Fewer for four seconds leaves as many as were asked for at any time.
        ([40, 40, 40, 5, 5, 5, 5, 5], [1, 1, 4, 4, 4, 4, 4, 1]),
        ([40, 40, 40, 5, 25, 5, 5, 5, 5, 5, 5, 5], [1, 1, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3]),
        ([40, 40, 40, 5, 25, 5, 5, 5, 5, 5, 5, 5, 5], [1, 1, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 1]),
        # So the pauses between batches take none.
        ([40, 40, 40, 0, 0, 0, 40, 0, 0, 0, 40], [1, 1, 4, 4, 4, 4, 4, 4, 4, 4, 4]),
        # From too few to too many, and back: each begins its own delay.
        ([25, 25, 25, 99, 5, 99, 99, 99], [1, 1, 3, 3, 3, 3, 3, 4]),
    ],
)
def test_the_number_follows_what_was_asked_for_during_the_whole_delay(loads: list[int], wanted: list[int]):
    scale, seen = Scale(1, 1), list[int]()
    for now, load in enumerate(loads):  # a clock may say 0
        scale = next_scale(POLICY, scale, load, float(now))
        seen.append(scale.wanted)
    assert seen == wanted


def test_without_delays_the_number_is_what_is_asked_for():
    policy = Policy(1, 4, 10, 0, 0)
    scale = Scale(1, 1)
    for load, wanted in ((35, 4), (12, 2), (0, 1), (11, 2)):
        scale = next_scale(policy, scale, load, 7.0)
        assert scale == Scale(wanted, wanted)
