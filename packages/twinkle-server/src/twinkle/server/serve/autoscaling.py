"""How many samplers are wanted for a load: the policy of Ray Serve's autoscaling, without Serve and without a clock."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Policy:
    """
    Attributes:
        min_replicas, max_replicas: samplers; the number stays between them.
        target_sequences: how many sequences each sampler is to draw, or have waiting.
        upscale_delay: seconds for which the load has to ask for more samplers without a break.
        downscale_delay: the same for fewer.
    """

    min_replicas: int
    max_replicas: int
    target_sequences: int
    upscale_delay: float
    downscale_delay: float

    def asked(self, sequences: int) -> int:
        """How many samplers a load asks for that stays as it is."""
        return min(max(ceil(sequences / self.target_sequences), self.min_replicas), self.max_replicas)


@dataclass(frozen=True)
class Scale:
    """What is wanted, and what the load has asked for since that was decided.

    Attributes:
        wanted: samplers.
        asked: what every load since `since` has asked for at least (more than `wanted`), or at most (fewer).
        since: when the load began to ask for more, or for fewer, without a break; None: it asks for what there is.
    """

    wanted: int
    asked: int
    since: float | None = None


def next_scale(policy: Policy, scale: Scale, sequences: int, now: float) -> Scale:
    """What is wanted once the load is `sequences`.

    Only what was asked for during the whole delay is given: a peak at its end brings no sampler, and a pause between
    two batches takes none.

    Args:
        sequences: being drawn or waiting, at all samplers together.
        now: seconds, by a clock that never goes back.
    """
    asked = policy.asked(sequences)
    if asked == scale.wanted:
        return Scale(asked, asked)
    is_more = asked > scale.wanted
    since = scale.since
    if since is None or is_more != (scale.asked > scale.wanted):
        since = now
    else:
        asked = min(asked, scale.asked) if is_more else max(asked, scale.asked)
    if now - since < (policy.upscale_delay if is_more else policy.downscale_delay):
        return Scale(scale.wanted, asked, since)
    return Scale(asked, asked)
