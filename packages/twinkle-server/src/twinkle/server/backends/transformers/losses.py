"""The losses, as pure functions of a row's log-probabilities. To add one: write the function, name it in `LOSSES`.

All are sums over the row's tokens. Tensors are float32 (log-probabilities, weights) or int64 (tokens), [T], on the
device of the computation; what a function returns stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from twinkle.protocol.types import LossFnConfig

TARGETS = "target_tokens"


@dataclass(frozen=True, eq=False)
class Loss:
    """A row's loss (a scalar with a graph), and further scalars by `name:reduction`, detached."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


LossFn: TypeAlias = Callable[[Tensor, dict[str, Tensor], LossFnConfig], Loss]


@dataclass(frozen=True)
class LossKind:
    """A loss function and the inputs that it reads, besides the target tokens."""

    function: LossFn
    inputs: tuple[str, ...]


def cross_entropy(logprobs: Tensor, inputs: dict[str, Tensor], config: LossFnConfig) -> Loss:
    """Weighted negative log-likelihood: sum over t of -weights[t] * logprobs[t].

    A weight may be any number: 0 leaves a token out, a fraction counts it in part, a negative one pushes it away.
    Source: Tinker's documentation of `cross_entropy`.
    """
    del config
    return Loss(-(inputs["weights"] * logprobs).sum())


LOSSES: dict[str, LossKind] = {"cross_entropy": LossKind(cross_entropy, ("weights",))}
