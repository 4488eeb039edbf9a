"""Advantages of completions relative to the others of the same prompt: GRPO, Dr. GRPO, RLOO."""

from typing import Literal, TypeAlias

import numpy as np

from twinkle.arrays import Float64Array, finite_array, number_between, whole_number
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Float32Array

Scale: TypeAlias = Literal["group", "batch", "none"]


def grpo_advantages(
    rewards: object, scale: Scale = "group", eps: float = 1e-6, group_size: int | None = None
) -> Float32Array:
    """Each reward less the mean of its group, divided by a standard deviation.

        A[p, g] = (r[p, g] - mean_g r[p, :]) / (std + eps)

    A group whose rewards are all equal gets exact zeros: nothing can be learnt from it. Standard deviations are
    population ones (divided by N, not N - 1).

    Args:
        rewards: [P, G], G completions of each of P prompts; or [N] with `group_size`, group after group.
        scale: "group" divides by the deviation of the group (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2);
            "batch" by that of all rewards (Lite PPO, Liu et al. 2025, arXiv:2508.08221); "none" does not divide
            (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
        eps: added to the deviation.
        group_size: G, where rewards are flat.

    Returns:
        float32 [P, G], also for flat rewards; `.ravel()` puts them in the order of the rewards.

    Raises:
        InvalidRequest: naming what is ragged, not finite, not divisible, or a group of one.
    """
    if scale not in ("group", "batch", "none"):
        raise InvalidRequest(f"scale: {scale!r}; allowed are 'group', 'batch' and 'none'")
    number_between("eps", eps, low=0)
    groups = grouped(rewards, group_size)
    centred = less_group_mean(groups)
    if scale == "none":
        return centred.astype(np.float32)
    deviation = groups.std(axis=1, keepdims=True) if scale == "group" else np.full((1, 1), groups.std())
    # If all are equal the deviation is 0, and with eps = 0 this would be 0 / 0.
    scaled = np.divide(centred, deviation + eps, out=np.zeros_like(centred), where=deviation > 0)
    return scaled.astype(np.float32)


def rloo_advantages(rewards: object, group_size: int | None = None) -> Float32Array:
    """Each reward less the mean of the others in its group.

        A[p, g] = r[p, g] - mean of r[p, h] over h != g  =  G / (G - 1) * (r[p, g] - mean_g r[p, :])

    REINFORCE leave-one-out: Ahmadian et al. 2024, arXiv:2402.14740, section 3.2.

    Args:
        rewards: [P, G], G completions of each of P prompts; or [N] with `group_size`, group after group.
        group_size: G, where rewards are flat.

    Returns:
        float32 [P, G].

    Raises:
        InvalidRequest: naming what is ragged, not finite, not divisible, or a group of one.
    """
    groups = grouped(rewards, group_size)
    size = groups.shape[1]
    return (less_group_mean(groups) * (size / (size - 1))).astype(np.float32)


def grouped(rewards: object, group_size: int | None) -> Float64Array:
    """Rewards as float64 [P, G], G at least 2.

    Raises:
        InvalidRequest: naming what is ragged, not finite, not divisible, or a group of one.
    """
    if group_size is None:
        groups = finite_array("rewards", rewards, "[P, G]")
    else:
        flat = finite_array("rewards", rewards, "[N]")
        if len(flat) % whole_number("group_size", group_size, minimum=1):
            raise InvalidRequest(
                f"rewards: {len(flat)} rewards are no whole number of groups of {group_size}; give group_size "
                "rewards for every prompt, group after group"
            )
        groups = flat.reshape(-1, group_size)
    if groups.shape[1] < 2:
        raise InvalidRequest(
            f"rewards: groups of {groups.shape[1]}; a completion is compared to others of the same prompt, so each "
            "needs at least 2: sample with group_size (num_samples) >= 2"
        )
    return groups


def less_group_mean(groups: Float64Array) -> Float64Array:
    """Each reward less the mean of its row; exact zeros where a row's rewards are all equal."""
    centred = groups - groups.mean(axis=1, keepdims=True)
    # The mean of equal numbers has a rounding error, which dividing by a deviation of the same size would blow up.
    centred[np.ptp(groups, axis=1) == 0] = 0.0
    return centred
