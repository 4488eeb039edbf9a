"""Distillation: a student learns from a teacher's log-probabilities, on its own samples or on existing text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from twinkle.data_format import Types, make_datum
from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout.protocols import Sampler
from twinkle.rollout.rollouts import Rollout

# A bar that appears for a moment would only be noise.
_PROGRESS_DELAY_SECONDS = 2.0


def teacher_log_ratios(
    rollouts: Sequence[Rollout], teacher_logprobs: Sequence[npt.ArrayLike]
) -> list[npt.NDArray[np.float32]]:
    """On-policy distillation: log p_teacher - log p_student of each token that the student sampled.

    Their mean is an estimate of -KL(student || teacher), in nats a token. Used as advantages, less that mean (a
    baseline that leaves the gradient's expectation as it is and reduces its variance), they lower the divergence (Gu et
    al. 2023, arXiv:2306.08543, equation 2; Agarwal et al. 2023, arXiv:2306.13649).

    Args:
        rollouts: what the student sampled, at temperature 1.
        teacher_logprobs: of each rollout's tokens after the first, float [T - 1]: what `twinkle.rollout.score` returns
            for `[rollout.tokens for rollout in rollouts]`.

    Returns:
        For each rollout float32 [num_sampled]: see `twinkle.rollout.to_training_data`.
    """
    if len(rollouts) != len(teacher_logprobs):
        raise InvalidRequest(f"teacher_logprobs: {len(teacher_logprobs)} for {len(rollouts)} rollouts")
    ratios: list[npt.NDArray[np.float32]] = []
    for i, (rollout, scores) in enumerate(zip(rollouts, teacher_logprobs, strict=True)):
        teacher = np.asarray(scores, np.float32)
        if teacher.shape != (len(rollout.tokens) - 1,):
            raise InvalidRequest(
                f"teacher_logprobs[{i}]: shape {list(teacher.shape)}; the rollout has {len(rollout.tokens) - 1} tokens "
                "after its first"
            )
        ratios.append(teacher[rollout.is_sampled[1:]] - rollout.sampled_logprobs)
    return ratios


def teacher_data(
    teacher: Sampler,
    features: Sequence[Any],
    k: int = 16,
    types: Types = core_types,
) -> list[Any]:
    """Off-policy distillation: the teacher's k likeliest tokens at each labelled position, as targets of cross_entropy.

    The loss, the sum over tokens of -sum_k p_teacher log p_student, differs from KL(teacher || student) truncated at k
    tokens only by the teacher's entropy (Hinton et al. 2015, arXiv:1503.02531). The k probabilities are normalised to
    sum to 1.

    Args:
        teacher: a sampling client.
        features: `input_ids` [T] and `labels` [T], as an encoded dataset has them.
        k: tokens per position.
        types: the `types` module of the teacher's client.

    Returns:
        For each feature a datum of `model_input` [T - 1], `target_tokens` int64 [T - 1, k] and `weights` float32
        [T - 1, k] (0 where the label excludes the token from training).
    """
    if k < 1:
        raise InvalidRequest(f"k: {k}; allowed are whole numbers from 1")
    pending = [
        _with_topk(
            teacher, types.ModelInput.from_ints([int(token) for token in feature["input_ids"]]), k, types
        )
        for feature in features
    ]
    bar = tqdm(
        pending, desc="asking the teacher", unit="sequence", delay=_PROGRESS_DELAY_SECONDS, leave=False
    )
    return [
        _topk_datum(feature, each.result().topk_prompt_logprobs, k, types)
        for feature, each in zip(features, bar, strict=True)
    ]


def _with_topk(teacher: Any, prompt: Any, k: int, types: Types) -> Any:
    return teacher.sample(
        prompt=prompt,
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=k,
    )


def _topk_datum(feature: Any, rows: Sequence[Any], k: int, types: Types) -> Any:
    """`rows[i]` are (token, log-probability) pairs of prompt position i; the first has none."""
    length = len(feature["input_ids"])
    targets = np.zeros((length - 1, k), np.int64)
    weights = np.zeros((length - 1, k), np.float32)
    for i, row in enumerate(rows[1:]):
        if feature["labels"][i + 1] < 0 or row is None:
            continue
        tokens, logprobs = zip(*row, strict=True)
        probabilities = np.exp(np.array(logprobs, np.float64))
        targets[i, : len(tokens)] = tokens
        weights[i, : len(tokens)] = probabilities / probabilities.sum()
    return make_datum(types, feature["input_ids"][:-1], {"target_tokens": targets, "weights": weights})
