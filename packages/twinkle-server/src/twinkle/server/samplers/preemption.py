"""Who makes room for whom: samples that are paused, to be read again and go on later. No torch.

Three rules. The oldest sample that runs is never paused, so there is always one that comes to its end. Memory that runs
out is given back by the tenant who has most of it. A tenant of whom nothing runs is given places by those who have more
than it gets, up to a quarter of all, and nobody gives away the last one for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from twinkle.server.samplers.cache_usage import Limits, Load

# A tenant of whom nothing runs is given so much of the rows, as a divisor.
FOR_NEWCOMERS = 4


@dataclass(frozen=True)
class Held:
    """A row of the batch, or a prompt on its way there.

    Attributes:
        order: rises with the time of the request, then with the sample's index.
        length: tokens that are kept of it.
        can_pause: whether it has begun.
    """

    tenant: str
    order: tuple[int, int]
    length: int
    can_pause: bool = True


def to_shrink(held: Sequence[Held]) -> int | None:
    """Which row is paused where memory has run out: the newest of the tenant who has most; None if only the oldest one
    is left.
    """
    most = Counter[str]()
    for one in held:
        most[one.tenant] += one.length
    return _newest_of_most(held, most, {one.tenant for one in held})


def to_make_room(held: Sequence[Held], limits: Limits, length: int, samples: int) -> list[int]:
    """Which rows are paused for a tenant of whom nothing runs; none if that would not do.

    Args:
        length: what each of its samples takes to begin with.
        samples: how many it has waiting.
    """
    kept_anyhow = _first_of_each(held)
    if not Load.of(limits, (one.length for one in kept_anyhow)).fitting(length, 1, may_fill=True):
        return []
    left = list(held)
    want = max(1, min(samples, limits.rows // FOR_NEWCOMERS))
    while True:
        load = Load.of(limits, (one.length for one in left))
        fitting = load.fitting(length, want, may_fill=True)
        needs_rows = fitting < want and fitting == limits.rows - load.rows
        # What is kept in memory is dear, so that room for one is enough there; rows are shared evenly.
        if fitting == want or (fitting and not needs_rows):
            break
        rows = Counter(one.tenant for one in left)
        tokens = Counter[str]()
        for one in left:
            tokens[one.tenant] += one.length
        givers = {tenant for tenant, count in rows.items() if count > fitting + 1}
        victim = _newest_of_most(left, rows if needs_rows else tokens, givers)
        if victim is None:
            break
        del left[victim]
    kept = {id(one) for one in left}
    return [i for i, one in enumerate(held) if id(one) not in kept] if fitting else []


def _newest_of_most(held: Sequence[Held], most: Counter[str], givers: AbstractSet[str]) -> int | None:
    """The newest row of the giver who has most; never the oldest row of all."""
    running = [i for i, one in enumerate(held) if one.can_pause]
    oldest = min(running, key=lambda i: held[i].order, default=None)
    candidates = [i for i in running if i != oldest and held[i].tenant in givers]
    return max(candidates, key=lambda i: (most[held[i].tenant], held[i].order), default=None)


def _first_of_each(held: Sequence[Held]) -> list[Held]:
    """What nobody gives away for newcomers: the oldest of each tenant, and what can't be paused."""
    oldest: dict[str, Held] = {}
    for one in held:
        if one.can_pause and (one.tenant not in oldest or one.order < oldest[one.tenant].order):
            oldest[one.tenant] = one
    return [*oldest.values(), *(one for one in held if not one.can_pause)]
