"""From logits to tokens: temperature, top-k, top-p, and reproducible draws, for all rows of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twinkle.protocol.types import TopkRow

UNIFORMS_AT_ONCE = 256

# A temperature below this is taken for this, which is as good as greedy: dividing by less overflows float32.
_MIN_TEMPERATURE = 1e-30

# Rows times vocabulary, in double precision, that alternatives are drawn from at once.
_PROBABILITIES_AT_ONCE = 2**21

# Sets the stream of a prompt's alternatives apart from those of samples.
_ALTERNATIVES = 1


class Uniforms:
    """A sample's stream of uniform numbers in [0, 1): a function of seed and sample index alone, whoever shares the
    batch (Philox, Salmon et al., SC 2011).
    """

    def __init__(self, seed: int, sample: int) -> None:
        entropy = np.random.SeedSequence((seed % 2**64, sample))
        self._generator = np.random.Generator(np.random.Philox(entropy))
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._generator.random(UNIFORMS_AT_ONCE).tolist()[::-1]
        return self._block.pop()


def alternatives_generator(seed: int) -> np.random.Generator:
    """Uniform numbers for a prompt's alternatives, a function of the seed alone; no sample's stream."""
    entropy = np.random.SeedSequence(seed % 2**64, spawn_key=(_ALTERNATIVES,))
    return np.random.Generator(np.random.Philox(entropy))


@dataclass(frozen=True, eq=False)
class DrawSettings:
    """How each row is drawn, as tensors [rows].

    Attributes:
        temperature: float32; 0 is greedy.
        top_k: int64; the size of the vocabulary is all.
        top_p: float32; 1 is all.
        filtered: whether any row uses top_k or top_p.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    filtered: bool


def tempered_logprobs(logits: Tensor, temperature: Tensor) -> Tensor:
    """Log-softmax of logits / temperature, float32 [rows, vocabulary]; where temperature is 0, of the logits."""
    divisor = torch.where(temperature == 0, 1.0, temperature.clamp(min=_MIN_TEMPERATURE))
    return torch.log_softmax(logits.float() / divisor.unsqueeze(1), dim=-1)


def draw(logprobs: Tensor, settings: DrawSettings, uniforms: Tensor) -> Tensor:
    """One token a row, int64 [rows], by inverting the cumulative distribution at `uniforms` float64 [rows].

    top_k is applied first; top_p then among those, renormalised. At least one token always remains.
    """
    if settings.filtered:
        drawn = _draw_filtered(logprobs, settings, uniforms)
    else:
        drawn = _invert(logprobs.double().exp(), uniforms.unsqueeze(1)).squeeze(1)
    return torch.where(settings.temperature == 0, logprobs.argmax(dim=-1), drawn)


def draw_alternatives(logprobs: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Several tokens a row, with replacement; neither top_k nor top_p applies.

    Args:
        logprobs: float32 [rows, vocabulary], of the plain distribution.
        temperature: of the draws; 0 gives the likeliest token each time.
        uniforms: float64 [rows, k] in [0, 1).

    Returns:
        int64 [rows, k].
    """
    if temperature == 0:
        return logprobs.argmax(dim=-1, keepdim=True).repeat(1, uniforms.shape[1])
    rows_at_once = max(1, _PROBABILITIES_AT_ONCE // logprobs.shape[-1])
    drawn: list[Tensor] = []
    for some, their_uniforms in zip(logprobs.split(rows_at_once), uniforms.split(rows_at_once), strict=True):
        # Log-probabilities are logits up to a constant, which the softmax takes out again.
        tempered = torch.log_softmax(some / max(temperature, _MIN_TEMPERATURE), dim=-1)
        drawn.append(_invert(tempered.double().exp(), their_uniforms))
    return torch.cat(drawn)


def topk_rows(logprobs: Tensor, tokens: Tensor) -> list[TopkRow]:
    """[n, k] each to n lists of k (token id, log-probability)."""
    return [
        list(zip(ids, values, strict=True))
        for ids, values in zip(tokens.tolist(), logprobs.tolist(), strict=True)
    ]


def _draw_filtered(logprobs: Tensor, settings: DrawSettings, uniforms: Tensor) -> Tensor:
    ordered, tokens = logprobs.sort(dim=-1, descending=True)
    probabilities = ordered.double().exp()
    ranks = torch.arange(logprobs.shape[-1], device=logprobs.device).unsqueeze(0)
    probabilities = probabilities.masked_fill(ranks >= settings.top_k.unsqueeze(1), 0.0)
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    beyond = (before >= settings.top_p.double().unsqueeze(1)) & (ranks > 0)
    chosen = _invert(probabilities.masked_fill(beyond, 0.0), uniforms.unsqueeze(1))
    return tokens.gather(1, chosen).squeeze(1)


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative probability is above uniform x total.

    Args:
        probabilities: float64 [rows, vocabulary], not all 0 in any row.
        uniforms: float64 [rows, k].

    Returns:
        int64 [rows, k].
    """
    cumulative = probabilities.cumsum(dim=-1)
    wanted = uniforms * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, wanted, right=True)
    # Rounding can lead beyond the last token that has any probability.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(index, last)
