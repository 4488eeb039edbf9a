"""Advantages token by token: REINFORCE++ and generalized advantage estimation."""

from collections.abc import Sequence

import numpy as np

from twinkle.advantage.group import grouped, less_group_mean
from twinkle.arrays import Float64Array, finite_array, number_between, whole_number
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Float32Array


def reinforce_plus_plus_advantages(
    rewards: object,
    lengths: Sequence[int],
    kl: Sequence[object] | None = None,
    kl_coef: float | None = None,
    group_size: int | None = None,
    eps: float = 1e-8,
) -> list[Float32Array]:
    """REINFORCE++: a completion's reward less the KL cost of its remaining tokens, normalised over the batch's tokens.

        a[i, t] = r[i] - kl_coef * sum of kl[i][u] over u >= t
        A[i, t] = (a[i, t] - mean) / (std + eps), mean and population std over all tokens of all completions

    Hu et al. 2025, arXiv:2501.03262. With `group_size` it is the paper's REINFORCE++-baseline: the mean reward of its
    group is subtracted from each r[i] first.

    Args:
        rewards: [N], one per completion.
        lengths: the number of tokens T_i of each completion.
        kl: N arrays [T_i], log p_sampler - log p_reference of each sampled token; default: no KL term.
        kl_coef: weight of the KL term, given with `kl`.
        group_size: completions per prompt, which must be consecutive in `rewards`; default: no baseline.
        eps: added to the standard deviation.

    Returns:
        N arrays, float32 [T_i]; all zero if all tokens are equal.

    Raises:
        InvalidRequest: naming what is ragged, not finite or differs in length; or if only one of `kl` and `kl_coef` is
            given.
    """
    number_between("eps", eps, low=0)
    flat = finite_array("rewards", rewards, "[N]")
    sizes = _lengths(lengths, len(flat))
    if (kl is None) != (kl_coef is None):
        raise InvalidRequest("kl, kl_coef: one without the other has no effect; give both, or neither")
    if group_size is not None:
        flat = less_group_mean(grouped(flat, group_size)).ravel()
    tokens = np.repeat(flat, sizes)
    if kl is not None and kl_coef is not None:
        tokens -= number_between("kl_coef", kl_coef, low=0) * _kl_to_come(kl, sizes)
    if tokens.size == 0 or np.ptp(tokens) == 0:  # the mean of equal numbers has a rounding error
        normalised = np.zeros_like(tokens)
    else:
        normalised = (tokens - tokens.mean()) / (tokens.std() + eps)
    return np.split(normalised.astype(np.float32), np.cumsum(sizes)[:-1]) if sizes else []


def gae_advantages(
    rewards: object,
    values: object,
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    bootstrap_value: float = 0.0,
) -> tuple[Float32Array, Float32Array]:
    """Generalized advantage estimation over one trajectory.

        delta[t] = r[t] + gamma * V[t + 1] - V[t]
        A[t] = sum of (gamma * lam)^l * delta[t + l] over l >= 0

    Schulman et al. 2015, arXiv:1506.02438, equations 11 to 16.

    Args:
        rewards: [T], the reward of each step; for a single reward of the whole, zeros and that reward at the end.
        values: [T], the value V[t] of the state before step t.
        gamma: discount, 0 to 1.
        lam: 0 trusts the values (least variance), 1 the rewards (least bias).
        bootstrap_value: V[T], the value of the state after the last step: 0 if the trajectory ended there, the critic's
            estimate if it was cut off.

    Returns:
        Advantages and returns (advantages + values, what the critic is trained on), each float32 [T].

    Raises:
        InvalidRequest: naming what is not finite, differs in length or is out of range.
    """
    number_between("gamma", gamma, low=0, high=1)
    number_between("lam", lam, low=0, high=1)
    steps = finite_array("rewards", rewards, "[T]")
    before = finite_array("values", values, "[T]")
    after_last = finite_array("bootstrap_value", [bootstrap_value], "[1]")
    if len(before) != len(steps):
        raise InvalidRequest(
            f"values: {len(before)} values for {len(steps)} rewards; there must be one for the state before each "
            "step (give the value of the state after the last one as bootstrap_value)"
        )
    deltas = steps + gamma * np.concatenate([before[1:], after_last])[: len(steps)] - before
    advantages = np.zeros_like(deltas)
    carried = 0.0
    for t in reversed(range(len(deltas))):
        carried = float(deltas[t]) + gamma * lam * carried
        advantages[t] = carried
    return advantages.astype(np.float32), (advantages + before).astype(np.float32)


def _lengths(lengths: Sequence[int], count: int) -> list[int]:
    sizes = [whole_number(f"lengths[{i}]", length, minimum=0) for i, length in enumerate(lengths)]
    if len(sizes) != count:
        raise InvalidRequest(f"lengths: {len(sizes)} lengths for {count} rewards; there must be one for each")
    return sizes


def _kl_to_come(kl: Sequence[object], sizes: list[int]) -> Float64Array:
    """For each token of the batch, the sum of its KL term and those of later tokens, float64 [sum of T_i]."""
    if len(kl) != len(sizes):
        raise InvalidRequest(f"kl: {len(kl)} arrays for {len(sizes)} rewards; there must be one for each")
    sums: list[Float64Array] = [np.zeros(0)]
    for i, (values, size) in enumerate(zip(kl, sizes, strict=True)):
        terms = finite_array(f"kl[{i}]", values, "[T]")
        if len(terms) != size:
            raise InvalidRequest(
                f"kl[{i}]: {len(terms)} entries for lengths[{i}] = {size}; there must be one for each token"
            )
        sums.append(np.cumsum(terms[::-1])[::-1])
    return np.concatenate(sums)
