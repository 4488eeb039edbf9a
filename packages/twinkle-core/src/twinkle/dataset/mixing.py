"""The order in which the rows of several sources are taken, whether they are in memory or stream in."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np

from twinkle.protocol.errors import InvalidRequest

T = TypeVar("T")

Stop: TypeAlias = Literal["all_exhausted", "first_exhausted"]
"""When to stop taking rows: when no source has any more, or when the turn comes to one that has none."""


def check_mixing(weights: Sequence[float] | None, count: int, seed: int, stop: str) -> None:
    """Look at what a mix of `count` sources is asked for.

    Raises:
        InvalidRequest: naming what is out of its range.
    """
    if stop not in get_args(Stop):
        raise InvalidRequest(f"stop: {stop!r}; allowed are {', '.join(get_args(Stop))}")
    if seed < 0:
        raise InvalidRequest(f"seed: {seed}; allowed are whole numbers from 0")
    if weights is None:
        return
    if len(weights) != count:
        raise InvalidRequest(
            f"weights: {len(weights)} for {count} sources; give one for each, in their order"
        )
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise InvalidRequest(f"weights[{index}]: {weight}; allowed are numbers from 0")
    if not any(weights):
        raise InvalidRequest("weights: all are 0; at least one source has to be drawn from")


def mix(
    sources: Sequence[Iterator[T]], weights: Sequence[float] | None, seeds: Sequence[int], stop: Stop
) -> Iterator[T]:
    """The rows of all sources, each once, none read before its turn.

    Args:
        weights: how often each source is drawn from, in proportion; None takes one row of each in turn. What has a
            weight of 0 is never drawn.
        seeds: of the drawing; the same ones give the same order on every machine and with every numpy.
        stop: "all_exhausted" goes on with those that have rows left; "first_exhausted" ends when the turn comes to a
            source that has none.
    """
    if weights is None:
        yield from _in_turn(sources, stop)
        return
    # RandomState and not Generator: its streams never change from one numpy release to the next (NEP 19).
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(seeds))))
    left = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight > 0]
    while left:
        bounds = list(accumulate(weight for _, weight in left))
        while True:
            # Rounding may bring a number just below the last bound up to it.
            drawn = min(bisect_right(bounds, random.random_sample() * bounds[-1]), len(left) - 1)
            try:
                item = next(left[drawn][0])
            except StopIteration:
                break
            yield item
        if stop == "first_exhausted":
            return
        del left[drawn]


def _in_turn(sources: Sequence[Iterator[T]], stop: Stop) -> Iterator[T]:
    left = list(sources)
    while left:
        more: list[Iterator[T]] = []
        for source in left:
            try:
                item = next(source)
            except StopIteration:
                if stop == "first_exhausted":
                    return
                continue
            more.append(source)
            yield item
        left = more
