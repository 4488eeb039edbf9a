"""The losses, as pure functions of log-probabilities. To add one: write the function, name it in `LOSSES`, and add what
it reads to `formulas`, with its closed form.

A row's loss is a sum over its tokens, and is minimised; a function gives the terms of the sum for all rows at once, and
the caller adds up each row's own. Tensors are float32 [rows, tokens, k] on the computing device, with k = 1 unless the
loss takes several candidates per position; rows are padded at the right, with zero inputs. In the formulas `logprobs`
are those of the policy being trained, `inputs["logprobs"]` (q below) those under which the tokens were sampled, and
ratio = exp(logprobs - q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

# exp of it is finite in float32, so that a token with an advantage of 0 can't make the loss 0 x infinity.
_MAX_LOG_RATIO = 80.0

LossConfig: TypeAlias = Mapping[str, float]
LossFn: TypeAlias = Callable[[Tensor, Mapping[str, Tensor], LossConfig], Tensor]


def cross_entropy(logprobs: Tensor, inputs: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """Weighted negative log-likelihood: sum of -weights * logprobs over all positions (and candidates).

    A weight may be any number: 0 leaves a token out, a fraction counts it in part, a negative one pushes it away. With
    [T, K] and a distribution as weights it is the cross entropy against that distribution.
    Source: Tinker's documentation of `cross_entropy`.
    """
    del config
    return -inputs["weights"] * logprobs


def importance_sampling(logprobs: Tensor, inputs: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """Policy gradient with importance weights: sum of -ratio * advantages.

    Source: Tinker's documentation of `importance_sampling`.
    """
    del config
    return -_ratio(logprobs, inputs) * inputs["advantages"]


def ppo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """Clipped surrogate objective: sum of -min(ratio * A, clip(ratio, low, high) * A), A the advantages.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7, a token at a time, with two thresholds.
    """
    return _clipped(_ratio(logprobs, inputs), inputs["advantages"], config)


def cispo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """Clipped importance weights: sum of -sg(clip(ratio, low, high)) * A * logprobs, sg being stop-gradient.

    Every token keeps its gradient; only the weight of it is bounded.
    Source: MiniMax-M1, arXiv:2506.13585, equation 4, as a sum over tokens.
    """
    weight = (
        _ratio(logprobs, inputs).detach().clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    )
    return -weight * inputs["advantages"] * logprobs


def dro(logprobs: Tensor, inputs: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """Direct reward optimization: sum of -(logprobs * A - beta / 2 * (logprobs - q) ** 2).

    Source: Richemond et al. 2024, arXiv:2405.19107, in the form of Tinker's documentation of `dro`.
    """
    penalty = 0.5 * config["beta"] * (logprobs - inputs["logprobs"]).square()
    return penalty - logprobs * inputs["advantages"]


def gspo(logprobs: Tensor, inputs: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """Clipped surrogate objective with one ratio for the sequence, in its token-level form (GSPO-token).

    s = exp(mean of (logprobs - q) over the tokens M that `sequence_ratio_mask` marks); each token's ratio has the value
    of s and the gradient of its own log-probability, s_t = sg(s) * exp(logprobs - sg(logprobs)); the loss is the sum of
    -min(s_t * A, clip(s_t, low, high) * A). If M is empty, s is 1.
    Source: Zheng et al. 2025, arXiv:2507.18071, equations 7, 14 and 15, as a sum over tokens.
    """
    marked = (inputs["sequence_ratio_mask"] != 0).float()
    counts = marked.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    log_ratio = ((logprobs.detach() - inputs["logprobs"]) * marked).sum(dim=(1, 2), keepdim=True) / counts
    ratio = torch.exp(log_ratio.clamp(max=_MAX_LOG_RATIO) + logprobs - logprobs.detach())
    return _clipped(ratio, inputs["advantages"], config)


def _ratio(logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.exp((logprobs - inputs["logprobs"]).clamp(max=_MAX_LOG_RATIO))


def _clipped(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * advantages, clipped * advantages)


LOSSES: dict[str, LossFn] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
