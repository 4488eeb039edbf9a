"""The order in which rows are taken from several sources, in memory or streaming."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np

from twinkle.protocol.errors import InvalidRequest

T = TypeVar("T")

Stop: TypeAlias = Literal["all_exhausted", "first_exhausted"]
"""When to stop: when no source has rows left, or at the first that has none."""


def check_mixing(weights: Sequence[float] | None, count: int, seed: int, stop: str) -> None:
    """Check the arguments of a mix of `count` sources.

    Raises:
        InvalidRequest: naming the argument that is out of range.
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
    """The rows of all sources, each once and none read early.

    Args:
        weights: relative frequency of each source; default: one row of each in turn. A source of weight 0 is never
            drawn from.
        seeds: of the random choice; the same seeds give the same order on every machine and numpy version.
        stop: "all_exhausted" continues with those that have rows left; "first_exhausted" stops at the first that has
            none.
    """
    if weights is None:
        yield from _in_turn(sources, stop)
        return
    # RandomState, not Generator: its streams are frozen across numpy releases (NEP 19).
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(seeds))))
    left = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight > 0]
    while left:
        bounds = list(accumulate(weight for _, weight in left))
        while True:
            # Rounding may lift a number just below the last bound up to it.
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
