"""From logits to tokens: temperature, top-k, top-p, and reproducible draws, for all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from twinkle.protocol.types import SamplingParams, TopkTable
from twinkle.server.backends.lora.transfer import to_device

UNIFORMS_AT_ONCE = 256

# Lower temperatures are raised to this, which is as good as greedy: dividing by less overflows float32.
_MIN_TEMPERATURE = 1e-30

# Alternatives are drawn from at most this many rows times vocabulary at once, in double precision.
_PROBABILITIES_AT_ONCE = 2**21

# Tokens whose probabilities are added up before the cumulative sum.
_BLOCK = 128

# How many of the likeliest tokens top_k and top_p are applied to at first.
_CANDIDATES = 512


class Uniforms:
    """A sample's stream of uniform numbers in [0, 1): a function of seed and sample index alone, whatever shares the
    batch (Philox, Salmon et al., SC 2011). (The logits aren't: matrix products round depending on the batch's shape.)
    """

    def __init__(self, seed: int, sample: int) -> None:
        entropy = np.random.SeedSequence((seed % 2**64, sample))
        self._generator = np.random.Generator(np.random.Philox(entropy))
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._generator.random(UNIFORMS_AT_ONCE).tolist()[::-1]
        return self._block.pop()


@dataclass(frozen=True, eq=False)
class DrawSettings:
    """How each row is drawn.

    Attributes:
        temperature: float32 [rows, 1], 1 for greedy rows; None: 1 everywhere.
        greedy: int64, the rows that take the likeliest token; None: none do.
        filtered: int64, the rows that use top_k or top_p; None: none do.
        top_k: int64 [filtered]; the size of the vocabulary means all.
        top_p: float64 [filtered]; 1 means all.
    """

    temperature: Tensor | None
    greedy: Tensor | None
    filtered: Tensor | None
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> DrawSettings:
        """From each row's parameters."""
        temperatures = [max(p.temperature, _MIN_TEMPERATURE) if p.temperature else 1.0 for p in params]
        greedy = [row for row, p in enumerate(params) if p.temperature == 0]
        filtered = [row for row, p in enumerate(params) if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1)]
        top_k = [params[row].top_k if params[row].top_k > 0 else vocab_size for row in filtered]
        top_p = [params[row].top_p for row in filtered]
        all_are_1 = all(t == 1 for t in temperatures)
        return cls(
            None
            if all_are_1
            else to_device(torch.tensor(temperatures, dtype=torch.float32), device).unsqueeze(1),
            to_device(torch.tensor(greedy), device) if greedy else None,
            to_device(torch.tensor(filtered), device) if filtered else None,
            to_device(torch.tensor(top_k, dtype=torch.int64), device),
            to_device(torch.tensor(top_p, dtype=torch.float64), device),
        )


def tempered_logprobs(logits: Tensor, settings: DrawSettings) -> Tensor:
    """Log-softmax of logits / temperature, float32 [rows, vocabulary]; for greedy rows, of the logits."""
    logits = logits.float()
    if settings.temperature is not None:
        logits = logits / settings.temperature
    return torch.log_softmax(logits, dim=-1)


def draw(logprobs: Tensor, settings: DrawSettings, uniforms: Tensor) -> Tensor:
    """One token per row, int64 [rows], by inverting the cumulative distribution at `uniforms` float64 [rows].

    top_k is applied first, then top_p among those, renormalised. At least one token always remains.
    """
    tokens = _draw_plain(logprobs.exp(), uniforms)
    if (rows := settings.filtered) is not None:
        tokens[rows] = _draw_filtered(logprobs[rows], settings.top_k, settings.top_p, uniforms[rows])
    if (rows := settings.greedy) is not None:
        tokens[rows] = logprobs[rows].argmax(dim=-1)
    return tokens


def draw_alternatives(logprobs: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Several tokens per row, with replacement; top_k and top_p don't apply.

    Args:
        logprobs: float32 [rows, vocabulary], of the plain distribution.
        temperature: of the draws; 0 always gives the likeliest token.
        uniforms: float64 [rows, k] in [0, 1).

    Returns:
        int64 [rows, k].
    """
    if temperature == 0:
        return logprobs.argmax(dim=-1, keepdim=True).repeat(1, uniforms.shape[1])
    rows_at_once = max(1, _PROBABILITIES_AT_ONCE // logprobs.shape[-1])
    drawn: list[Tensor] = []
    for some, their_uniforms in zip(logprobs.split(rows_at_once), uniforms.split(rows_at_once), strict=True):
        # Log-probabilities are logits up to a constant, which the softmax removes.
        tempered = torch.log_softmax(some / max(temperature, _MIN_TEMPERATURE), dim=-1)
        drawn.append(_invert(tempered.double().exp(), their_uniforms))
    return torch.cat(drawn)


def topk_table(logprobs: Tensor, tokens: Tensor) -> TopkTable:
    """Of [n, k] each."""
    return TopkTable(tokens.to(torch.int32).cpu().numpy(), logprobs.float().cpu().numpy())


def _draw_filtered(logprobs: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens of rows that all use top_k or top_p, int64 [rows].

    Sorting a whole vocabulary is slow, and few rows need it. A row's need depends on that row alone: equally likely
    tokens may be ordered differently then, and no row's draw may depend on others.
    """
    vocab_size = logprobs.shape[-1]
    best, tokens = logprobs.topk(min(_CANDIDATES, vocab_size), dim=-1)
    reached = best.double().exp().sum(dim=-1) >= top_p
    enough = (top_k <= best.shape[-1]) | ((top_k >= vocab_size) & reached)
    whole = top_k >= vocab_size
    drawn = _draw_ordered(best, tokens, top_k, top_p, whole, uniforms)
    if not bool(enough.all()):
        rows = (~enough).nonzero().squeeze(1)
        best, tokens = logprobs[rows].sort(dim=-1, descending=True)
        drawn[rows] = _draw_ordered(best, tokens, top_k[rows], top_p[rows], whole[rows], uniforms[rows])
    return drawn


def _draw_ordered(
    ordered: Tensor, tokens: Tensor, top_k: Tensor, top_p: Tensor, whole: Tensor, uniforms: Tensor
) -> Tensor:
    """Draw among the n likeliest tokens of each row.

    Args:
        ordered: [rows, n], their log-probabilities, descending.
        tokens: int64 [rows, n], the tokens.
        whole: bool [rows], whether top_k leaves the whole vocabulary.
    """
    probabilities = ordered.double().exp()
    ranks = torch.arange(ordered.shape[-1], device=ordered.device).unsqueeze(0)
    probabilities = probabilities.masked_fill(ranks >= top_k.unsqueeze(1), 0.0)
    total = torch.where(whole, 1.0, probabilities.sum(dim=-1))
    before = _cumulative(probabilities) - probabilities
    beyond = (before >= (top_p * total).unsqueeze(1)) & (ranks > 0)
    chosen = _invert(probabilities.masked_fill(beyond, 0.0), uniforms.unsqueeze(1))
    return tokens.gather(1, chosen).squeeze(1)


def _draw_plain(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row, int64 [rows], from float32 [rows, vocabulary] at `uniforms` float64 [rows].

    First finds the block of tokens, then the token in the block: cumulative sums over a whole vocabulary take longer
    than everything else about a draw.
    """
    vocab_size = probabilities.shape[-1]
    if missing := -vocab_size % _BLOCK:
        probabilities = functional.pad(probabilities, (0, missing))
    blocks = probabilities.unflatten(1, (-1, _BLOCK))
    ends = _cumulative(blocks.sum(dim=-1).double())
    wanted = _below(uniforms.unsqueeze(1) * ends[:, -1:], ends[:, -1:])
    # NaNs are never found; that must not lead out of the table.
    block = torch.searchsorted(ends, wanted, right=True).clamp(max=blocks.shape[1] - 1)
    before = functional.pad(ends, (1, 0)).gather(1, block)
    within = _cumulative(blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).double())
    wanted = _below(wanted - before, within[:, -1:])
    tokens = block * _BLOCK + torch.searchsorted(within, wanted, right=True)
    return tokens.squeeze(1).clamp(max=vocab_size - 1)


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative probability is above uniform x total.

    Args:
        probabilities: float64 [rows, n], not all 0 in any row.
        uniforms: float64 [rows, k].

    Returns:
        int64 [rows, k].
    """
    cumulative = _cumulative(probabilities)
    wanted = _below(uniforms * cumulative[:, -1:], cumulative[:, -1:])
    return torch.searchsorted(cumulative, wanted, right=True).clamp(max=probabilities.shape[-1] - 1)


def _cumulative(x: Tensor) -> Tensor:
    """Sums of all up to and with each, along the last dimension."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return sums_in_one_order(x)  # torch has no such kernel for floats
    return x.cumsum(dim=-1)


def sums_in_one_order(x: Tensor) -> Tensor:
    """The same, by additions alone (Hillis and Steele 1986, doi:10.1145/7902.7903)."""
    step = 1
    while step < x.shape[-1]:
        x = x + functional.pad(x[..., :-step], (step, 0))
        step *= 2
    return x


def _below(wanted: Tensor, total: Tensor) -> Tensor:
    """Rounding can give the total, which is beyond the last token with any probability."""
    return torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
