"""Constant, linear and cosine schedules, each with a linear warm-up.

Steps are counted from 0. The warm-up rises linearly from peak / warmup_steps at step 0, so that no step is wasted on a
learning rate of zero, to the peak at step warmup_steps - 1. The decay begins at step warmup_steps, still at the peak,
and would reach its floor at step total_steps, one after the last; later steps stay at the floor.

Compared with Transformers' `get_*_schedule_with_warmup`: during the warm-up ours at a step is theirs at step + 1; after
it both are the same.
"""

import math

from twinkle.protocol.errors import InvalidRequest


def constant(step: int, peak: float, warmup_steps: int = 0) -> float:
    """`peak` at every step after the warm-up.

    Args:
        step: from 0.
        peak: the learning rate.
        warmup_steps: steps on the way up to it.

    Raises:
        InvalidRequest: naming a number that is negative, not finite or not whole.
    """
    _check(step, peak, warmup_steps)
    return _warm(step, peak, warmup_steps)


def linear(step: int, total_steps: int, peak: float, warmup_steps: int = 0, floor: float = 0.0) -> float:
    """A straight line from `peak` at the end of the warm-up down to `floor` at `total_steps`.

    Args:
        step: from 0.
        total_steps: steps of the whole training, warm-up included.
        peak: the highest learning rate.
        warmup_steps: steps on the way up to it.
        floor: the lowest learning rate of the decay; the warm-up rises from zero whatever it is.

    Raises:
        InvalidRequest: naming a number that is negative, not finite, not whole, or does not fit the others.
    """
    _check(step, peak, warmup_steps, total_steps, floor)
    if step < warmup_steps:
        return _warm(step, peak, warmup_steps)
    return floor + (peak - floor) * (1 - _progress(step, total_steps, warmup_steps))


def cosine(step: int, total_steps: int, peak: float, warmup_steps: int = 0, floor: float = 0.0) -> float:
    """Half a cosine wave from `peak` at the end of the warm-up down to `floor` at `total_steps`.

        floor + (peak - floor) * (1 + cos(pi * progress)) / 2

    SGDR without restarts: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5. Arguments and errors as in `linear`.
    """
    _check(step, peak, warmup_steps, total_steps, floor)
    if step < warmup_steps:
        return _warm(step, peak, warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * _progress(step, total_steps, warmup_steps))) / 2


def _warm(step: int, peak: float, warmup_steps: int) -> float:
    return peak * (step + 1) / warmup_steps if step < warmup_steps else float(peak)


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Progress of the decay, from 0 at its first step to 1 at `total_steps` and beyond."""
    return 1.0 if step >= total_steps else (step - warmup_steps) / (total_steps - warmup_steps)


def _check(
    step: int, peak: float, warmup_steps: int, total_steps: int | None = None, floor: float = 0.0
) -> None:
    counts = {"step": (step, 0), "warmup_steps": (warmup_steps, 0), "total_steps": (total_steps, 1)}
    for name, (count, minimum) in counts.items():
        if count is not None and not (float(count).is_integer() and count >= minimum):
            raise InvalidRequest(f"{name}: {count!r}; allowed are whole numbers from {minimum}")
    for name, rate in {"peak": peak, "floor": floor}.items():
        if not (math.isfinite(rate) and rate >= 0):
            raise InvalidRequest(f"{name}: {rate!r}; a learning rate is a finite number from 0")
    if total_steps is not None and warmup_steps > total_steps:
        raise InvalidRequest(f"warmup_steps: {warmup_steps}; at most total_steps, which is {total_steps}")
    if floor > peak:
        raise InvalidRequest(f"floor: {floor!r}; at most the peak, which is {peak!r}")
