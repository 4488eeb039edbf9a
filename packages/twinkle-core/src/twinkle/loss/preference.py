"""Losses over pairs of a chosen and a rejected answer: DPO, SimPO and ORPO.

All are functions of each answer's log-probability, s = sum over its tokens of weight x logprob, so each gradient takes
one line. A batch holds the pairs one after the other, each with its chosen answer first: see `pair_data`. Every loss is
the mean over the pairs. Metrics are `accuracy:mean`, the share of pairs whose chosen answer scores higher, and
`margin:mean`, by how much (as each loss defines it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from twinkle.data_format import Types, to_datum
from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Datum
from twinkle.verbs.custom_loss import ClosedFormLoss, Float64Array, LossValue

REFERENCE = "reference_logprobs"
"""The loss input for the log-probabilities of the target tokens under the reference model, float32 [T]."""


def pair_data(
    pairs: Sequence[Mapping[str, Any]],
    reference_logprobs: Sequence[npt.ArrayLike] | None = None,
    types: Types = core_types,
) -> list[Any]:
    """The datums of pairs: chosen, rejected, chosen, rejected, ...

    Args:
        pairs: rows whose `chosen` and `rejected` are features, from `Dataset.encode_pairs`.
        reference_logprobs: for DPO, of each feature's tokens after the first, float [T - 1], in the order of the
            result: what `twinkle.rollout.score` returns for the `input_ids` of chosen, rejected, chosen, ...
        types: the client's module of types; `tinker.types` for Tinker's SDK.

    Raises:
        InvalidRequest: naming the pair, if a side is missing, has no token to train on, or differs in length from its
            reference.
    """
    data: list[Any] = []
    for i, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            where = f"pairs[{i}].{side}"
            feature = pair.get(side)
            if not isinstance(feature, Mapping):
                raise InvalidRequest(
                    f"{where}: expected a feature with input_ids and labels; call dataset.encode_pairs() first"
                )
            datum = to_datum(cast(Mapping[str, Any], feature), types)
            if not datum.loss_fn_inputs["weights"].to_numpy().any():
                raise InvalidRequest(
                    f"{where}: no token of the answer is trained on; the pair teaches nothing"
                )
            data.append(datum)
    if reference_logprobs is None:
        return data
    if len(reference_logprobs) != len(data):
        raise InvalidRequest(
            f"reference_logprobs: {len(reference_logprobs)} entries for {len(pairs)} pairs; one for each side is needed"
        )
    return [
        _with_reference(datum, reference, f"reference_logprobs[{i}]", types)
        for i, (datum, reference) in enumerate(zip(data, reference_logprobs, strict=True))
    ]


def dpo_loss(beta: float = 0.1, label_smoothing: float = 0.0) -> ClosedFormLoss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    With r = beta (s - s_reference) of each answer, its implicit reward, and m = r_chosen - r_rejected:
    -(1 - e) log sigmoid(m) - e log sigmoid(-m). Datums must hold `reference_logprobs`. `margin:mean` is the mean of m.

    Args:
        beta: strength of the penalty for leaving the reference.
        label_smoothing: e, the assumed share of wrong preferences (Mitchell 2023, conservative DPO); below 0.5.

    Raises:
        InvalidRequest: if a number is out of range.
    """
    _require_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise InvalidRequest(
            f"label_smoothing: {label_smoothing}; allowed are numbers from 0 up to, not including, 0.5"
        )

    def evaluate(data: Sequence[Datum], logprobs: list[Float64Array]) -> LossValue:
        answers = _answers("dpo_loss", data, logprobs)
        rewards = np.array([beta * (a.score - a.reference(i)) for i, a in enumerate(answers)])
        margins = rewards[0::2] - rewards[1::2]
        losses = _softplus(-margins) + label_smoothing * margins
        slopes = beta * (label_smoothing - _sigmoid(-margins))
        metrics = _pair_metrics(margins) | {
            "chosen_reward:mean": float(rewards[0::2].mean()),
            "rejected_reward:mean": float(rewards[1::2].mean()),
        }
        return _of_pairs(losses, answers, slopes, -slopes, metrics)

    return ClosedFormLoss("dpo_loss", evaluate)


def simpo_loss(beta: float = 2.0, gamma: float = 1.0) -> ClosedFormLoss:
    """SimPO: no reference, length-normalised (Meng et al. 2024, arXiv:2405.14734, equation 6).

    -log sigmoid(m) with m = beta (s_chosen / |chosen| - s_rejected / |rejected|) - gamma, where |.| is the sum of the
    answer's weights. `margin:mean` is the mean of m + gamma.

    Args:
        beta: scale of the mean log-probabilities.
        gamma: the target margin; at least 0.

    Raises:
        InvalidRequest: if a number is out of range.
    """
    _require_positive("beta", beta)
    if not (np.isfinite(gamma) and gamma >= 0):
        raise InvalidRequest(f"gamma: {gamma}; allowed are finite numbers from 0")

    def evaluate(data: Sequence[Datum], logprobs: list[Float64Array]) -> LossValue:
        answers = _answers("simpo_loss", data, logprobs)
        means = np.array([answer.score / answer.length for answer in answers])
        ahead = beta * (means[0::2] - means[1::2])
        slopes = -beta * _sigmoid(gamma - ahead)
        chosen = slopes / np.array([answer.length for answer in answers[0::2]])
        rejected = -slopes / np.array([answer.length for answer in answers[1::2]])
        return _of_pairs(_softplus(gamma - ahead), answers, chosen, rejected, _pair_metrics(ahead))

    return ClosedFormLoss("simpo_loss", evaluate)


def orpo_loss(weight: float = 0.1) -> ClosedFormLoss:
    """ORPO: supervised training on the chosen answer, with its odds against the rejected one (Hong et al. 2024,
    arXiv:2403.07691, equations 6 and 7).

    With p = exp(s / |answer|) of each: -s_chosen / |chosen| - weight log sigmoid(m), where m = log odds(p_chosen) -
    log odds(p_rejected) and odds(p) = p / (1 - p). `margin:mean` is the mean of m; `nll:mean` that of the first term.

    Args:
        weight: lambda, the weight of the odds term.

    Raises:
        InvalidRequest: if it is not above 0.
    """
    _require_positive("weight", weight)

    def evaluate(data: Sequence[Datum], logprobs: list[Float64Array]) -> LossValue:
        answers = _answers("orpo_loss", data, logprobs)
        lengths = np.array([answer.length for answer in answers])
        # The odds of a certain answer are infinite; this close to it, float32 log-probabilities are indistinguishable.
        means = np.minimum(np.array([answer.score for answer in answers]) / lengths, -1e-7)
        left = -np.expm1(means)  # 1 - p
        log_odds = means - np.log(left)
        margins = log_odds[0::2] - log_odds[1::2]
        slopes = -weight * _sigmoid(-margins)
        chosen = (slopes / left[0::2] - 1) / lengths[0::2]
        rejected = -slopes / left[1::2] / lengths[1::2]
        losses = -means[0::2] + weight * _softplus(-margins)
        metrics = _pair_metrics(margins) | {"nll:mean": float(-means[0::2].mean())}
        return _of_pairs(losses, answers, chosen, rejected, metrics)

    return ClosedFormLoss("orpo_loss", evaluate)


# ---------------------------------------------------------------- inside


class _Answer(NamedTuple):
    """One side of a pair.

    Attributes:
        datum: as given.
        weights: float64 [T].
        score: the sum of weight x logprob.
        length: the sum of the weights.
    """

    datum: Datum
    weights: Float64Array
    score: float
    length: float

    def reference(self, i: int) -> float:
        """The same sum under the reference model."""
        if REFERENCE not in self.datum.loss_fn_inputs:
            raise InvalidRequest(
                f"data[{i}].loss_fn_inputs: {REFERENCE} missing; give pair_data the scores of the reference model"
            )
        return float((self.weights * self.datum.loss_fn_inputs[REFERENCE].to_numpy()).sum())


def _answers(name: str, data: Sequence[Datum], logprobs: list[Float64Array]) -> list[_Answer]:
    if not data or len(data) % 2:
        raise InvalidRequest(
            f"data: {len(data)} datums; {name} takes pairs, a chosen answer and then a rejected one (pair_data)"
        )
    answers: list[_Answer] = []
    for i, (datum, each) in enumerate(zip(data, logprobs, strict=True)):
        if "weights" not in datum.loss_fn_inputs:
            raise InvalidRequest(
                f"data[{i}].loss_fn_inputs: weights missing; {name} needs to know the answer's tokens"
            )
        weights = datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64)
        if weights.shape != each.shape or weights.sum() <= 0:
            raise InvalidRequest(
                f"data[{i}].loss_fn_inputs.weights: need one for each of {len(each)} tokens, and a sum above 0"
            )
        answers.append(_Answer(datum, weights, float((weights * each).sum()), float(weights.sum())))
    return answers


def _of_pairs(
    losses: Float64Array,
    answers: Sequence[_Answer],
    chosen: Float64Array,
    rejected: Float64Array,
    metrics: dict[str, float],
) -> LossValue:
    """The mean over the pairs; `chosen` and `rejected` are each pair's derivatives in the two scores, float64
    [pairs].
    """
    slopes = np.stack([chosen, rejected], axis=1).ravel() / len(losses)
    gradients = [slope * answer.weights for slope, answer in zip(slopes, answers, strict=True)]
    return LossValue(float(losses.mean()), gradients, metrics)


def _pair_metrics(margins: Float64Array) -> dict[str, float]:
    return {"margin:mean": float(margins.mean()), "accuracy:mean": float((margins > 0).mean())}


def _with_reference(datum: Any, reference: npt.ArrayLike, where: str, types: Types) -> Any:
    values = np.asarray(reference, dtype=np.float32)
    if values.shape != (datum.model_input.length,):
        raise InvalidRequest(
            f"{where}: shape {list(values.shape)}; the answer has {datum.model_input.length} tokens after its first"
        )
    inputs = {**datum.loss_fn_inputs, REFERENCE: types.TensorData.from_numpy(values)}
    return types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def _sigmoid(x: Float64Array) -> Float64Array:
    return np.exp(-_softplus(-x))


def _softplus(x: Float64Array) -> Float64Array:
    return np.logaddexp(0.0, x)


def _require_positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise InvalidRequest(f"{name}: {value}; allowed are finite numbers above 0")
