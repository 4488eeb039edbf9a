"""Which running samples are preempted, to be recomputed from their tokens and go on later. No torch.

Three rules. The oldest running sample is never preempted, so there is always one that gets to its end. When memory runs
out, the tenant that has most of it gives some back. A tenant that has nothing running gets slots of those that have
more than it gets, up to a quarter of all, and nobody gives its last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from twinkle.server.samplers.cache_usage import CacheUsage, Limits

# The share of the rows, as a divisor, that a tenant with nothing running may get of others.
NEWCOMERS_SHARE = 4


@dataclass(frozen=True)
class Slot:
    """What a slot is taken by: a sample in the batch, or one whose prompt is being prefilled.

    Attributes:
        order: age, the oldest first: the request's number, then the sample's index.
        length: its tokens in the KV cache.
        can_preempt: whether it has begun.
    """

    tenant: str
    order: tuple[int, int]
    length: int
    can_preempt: bool = True


def victim(slots: Sequence[Slot]) -> int | None:
    """Which row is preempted when memory has run out: the newest of the tenant that has most; None if only the oldest
    is left.
    """
    tokens = Counter[str]()
    for slot in slots:
        tokens[slot.tenant] += slot.length
    return _newest_of_richest(slots, tokens, {slot.tenant for slot in slots})


def victims_for_newcomer(slots: Sequence[Slot], limits: Limits, length: int, samples: int) -> list[int]:
    """Which rows are preempted for a tenant that has nothing running; none if that would not be enough for it.

    Args:
        length: what each of its samples takes to begin with.
        samples: how many it has waiting.
    """
    protected = _oldest_of_each(slots)
    if not CacheUsage.of(limits, (slot.length for slot in protected)).fitting(length, 1, may_fill=True):
        return []
    left = list(slots)
    want = max(1, min(samples, limits.rows // NEWCOMERS_SHARE))
    while True:
        usage = CacheUsage.of(limits, (slot.length for slot in left))
        fitting = usage.fitting(length, want, may_fill=True)
        needs_rows = fitting < want and fitting == limits.rows - usage.rows
        # Recomputing long samples is dear, so room for one is enough where memory is short; rows are shared evenly.
        if fitting == want or (fitting and not needs_rows):
            break
        rows = Counter(slot.tenant for slot in left)
        tokens = Counter[str]()
        for slot in left:
            tokens[slot.tenant] += slot.length
        givers = {tenant for tenant, count in rows.items() if count > fitting + 1}
        row = _newest_of_richest(left, rows if needs_rows else tokens, givers)
        if row is None:
            break
        del left[row]
    kept = {id(slot) for slot in left}
    return [i for i, slot in enumerate(slots) if id(slot) not in kept] if fitting else []


def _newest_of_richest(slots: Sequence[Slot], wealth: Counter[str], givers: AbstractSet[str]) -> int | None:
    """The newest row of the giver that has most; never the oldest row of all."""
    running = [i for i, slot in enumerate(slots) if slot.can_preempt]
    oldest = min(running, key=lambda i: slots[i].order, default=None)
    candidates = [i for i in running if i != oldest and slots[i].tenant in givers]
    return max(candidates, key=lambda i: (wealth[slots[i].tenant], slots[i].order), default=None)


def _oldest_of_each(slots: Sequence[Slot]) -> list[Slot]:
    """What nobody gives away for newcomers: the oldest of each tenant, and what can't be preempted."""
    oldest: dict[str, Slot] = {}
    for slot in slots:
        if slot.can_preempt and (slot.tenant not in oldest or slot.order < oldest[slot.tenant].order):
            oldest[slot.tenant] = slot
    return [*oldest.values(), *(slot for slot in slots if not slot.can_preempt)]
