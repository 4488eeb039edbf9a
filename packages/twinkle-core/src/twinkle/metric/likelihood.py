"""Likelihood metrics: negative log-likelihood, perplexity, entropy, divergence; in nats per token."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from twinkle.metric.inputs import TrainingDatum, TrainingOutput, logprobs_and_weights, selected
from twinkle.protocol.errors import InvalidRequest

Estimator: TypeAlias = Literal["k1", "k2", "k3"]
ClippedLoss: TypeAlias = Literal["ppo", "cispo", "gspo"]


def nll(output: TrainingOutput, data: Sequence[TrainingDatum | Mapping[str, Any]]) -> float:
    """The mean negative log-likelihood of the trained tokens.

        -sum of w[i, t] * log p[i, t] / sum of w[i, t]

    Args:
        output: what `forward` or `forward_backward` with `cross_entropy` returned.
        data: its input: Datums with `weights`, or features with `input_ids` and `labels`.

    Returns:
        Nats per token; infinite if a token with a weight has probability 0.

    Raises:
        InvalidRequest: if the weights sum to zero (nothing was trained), or output and data don't belong together.
    """
    logprobs, weights = logprobs_and_weights(output, data)
    total = weights.sum()
    if total == 0:
        raise InvalidRequest(
            "data: all weights together are 0, so no token is trained; check the labels, or leave such data out"
        )
    trained = weights != 0  # entries without a weight may be -inf
    return float(-(weights[trained] * logprobs[trained]).sum() / total)


def perplexity(output: TrainingOutput, data: Sequence[TrainingDatum | Mapping[str, Any]]) -> float:
    """The exponential of `nll`: the number of equally likely tokens with the same uncertainty.

    Raises:
        InvalidRequest: as `nll`.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(nll(output, data)))


def entropy(logprobs: Sequence[object], mask: Sequence[object] | None = None) -> float:
    """A Monte Carlo estimate of the sampling distribution's entropy: the mean of -log p over the sampled tokens.

    The estimate holds if `logprobs` are those of the distribution that the tokens were drawn from: at temperature 1
    without top_k and top_p, the model's.

    Args:
        logprobs: of each sequence's sampled tokens, [T_i].
        mask: for each sequence the tokens that count, bool [T_i]; None is all.

    Returns:
        Nats per token.

    Raises:
        InvalidRequest: naming a sequence that is None, is not finite or differs in length from its mask; or if no token
            is left.
    """
    values, _ = selected("logprobs", logprobs, mask)
    return float(-values.mean())


def kl_divergence(
    sampler_logprobs: Sequence[object],
    trainer_logprobs: Sequence[object],
    mask: Sequence[object] | None = None,
    estimator: Estimator = "k3",
) -> float:
    """An estimate of KL(sampler || trainer) from the sampler's tokens, in nats per token.

    With d = log p_trainer - log p_sampler of each token it is the mean of

        k1: -d                  unbiased, of high variance; may come out negative
        k2: d^2 / 2             biased, of low variance
        k3: exp(d) - 1 - d      unbiased, of low variance; never negative

    Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. A sampler and a trainer with
    the same weights should agree up to rounding: a growing value points to samples from stale weights, or to a bug.

    Args:
        sampler_logprobs: of each sequence's tokens when they were sampled, [T_i].
        trainer_logprobs: of the same tokens in a training pass, [T_i].
        mask: for each sequence the tokens that count, bool [T_i]; None is all.
        estimator: "k1", "k2" or "k3".

    Raises:
        InvalidRequest: naming a sequence that is None, is not finite or differs in length; or if no token is left.
    """
    if estimator not in ("k1", "k2", "k3"):
        raise InvalidRequest(f"estimator: {estimator!r}; allowed are 'k1', 'k2' and 'k3'")
    if len(sampler_logprobs) != len(trainer_logprobs):
        raise InvalidRequest(
            f"trainer_logprobs: {len(trainer_logprobs)} sequences for {len(sampler_logprobs)} of the sampler; there "
            "must be one for each"
        )
    sampler, sampler_lengths = selected("sampler_logprobs", sampler_logprobs, mask)
    trainer, trainer_lengths = selected("trainer_logprobs", trainer_logprobs, mask)
    for i, (length, expected) in enumerate(zip(trainer_lengths, sampler_lengths, strict=True)):
        if length != expected:
            raise InvalidRequest(
                f"trainer_logprobs[{i}]: {length} entries for {expected} of the sampler; both are of the same tokens"
            )
    difference = trainer - sampler
    if estimator == "k1":
        return float(-difference.mean())
    if estimator == "k2":
        return float((difference**2).mean() / 2)
    with np.errstate(over="ignore"):
        return float((np.expm1(difference) - difference).mean())


def policy_metrics(
    output: TrainingOutput,
    data: Sequence[TrainingDatum],
    clip_low_threshold: float | None = None,
    clip_high_threshold: float | None = None,
    loss_fn: ClippedLoss = "ppo",
) -> dict[str, float]:
    """Divergence of the trainer from the sampler, and the sampler's entropy, from a policy gradient pass.

    Args:
        output: what `forward_backward` with importance_sampling, ppo, cispo, dro or gspo returned.
        data: its input, from `twinkle.rollout.to_training_data`: tokens with a nonzero advantage count.
        clip_low_threshold, clip_high_threshold: of the loss, for the share of clipped tokens.
        loss_fn: the loss of these thresholds. "ppo" clips ratios above the upper one if the advantage is positive, and
            below the lower one if it is negative: such tokens have no gradient. "gspo" does the same with the ratio of
            the whole sequence (of its `sequence_ratio_mask`). "cispo" bounds the weight of every token whose ratio is
            outside.

    Returns:
        `kl`, KL(sampler || trainer) (k3 of `kl_divergence`) and `entropy`, in nats a token; with thresholds also
        `clipped`, a share.

    Raises:
        InvalidRequest: if output and data don't belong together, no token counts, or the loss is not one of these.
    """
    if loss_fn not in get_args(ClippedLoss):
        raise InvalidRequest(f"loss_fn: {loss_fn!r}; allowed are {', '.join(get_args(ClippedLoss))}")
    if len(output.loss_fn_outputs) != len(data):
        raise InvalidRequest(
            f"data: {len(data)} datums for {len(output.loss_fn_outputs)} outputs; give what was passed"
        )
    sampled = [datum.loss_fn_inputs["logprobs"].to_numpy() for datum in data]
    trained = [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]
    masks = [datum.loss_fn_inputs["advantages"].to_numpy() != 0 for datum in data]
    metrics = {"kl": kl_divergence(sampled, trained, masks), "entropy": entropy(sampled, masks)}
    if clip_low_threshold is not None or clip_high_threshold is not None:
        low = -np.inf if clip_low_threshold is None else clip_low_threshold
        high = np.inf if clip_high_threshold is None else clip_high_threshold
        clipped = [
            _clipped(datum, new - old, loss_fn, low, high)[mask]
            for datum, new, old, mask in zip(data, trained, sampled, masks, strict=True)
        ]
        metrics["clipped"] = float(np.concatenate(clipped).mean())
    return metrics


def _clipped(
    datum: TrainingDatum, log_ratios: npt.NDArray[Any], loss_fn: ClippedLoss, low: float, high: float
) -> npt.NDArray[np.bool_]:
    """Which tokens a loss clips, bool [T]."""
    with np.errstate(over="ignore"):
        ratios = np.exp(log_ratios)
        if loss_fn == "gspo":
            marked = datum.loss_fn_inputs["sequence_ratio_mask"].to_numpy() != 0
            ratios = np.full_like(ratios, np.exp(log_ratios[marked].mean()) if marked.any() else 1.0)
    above, below = ratios > high, ratios < low
    if loss_fn == "cispo":
        return above | below
    advantages = datum.loss_fn_inputs["advantages"].to_numpy()
    return (above & (advantages > 0)) | (below & (advantages < 0))
