"""What a request wants to know about its prompt's tokens, and the answers. No torch.

Row i is the model's distribution over prompt token i + 1, so a prompt of T tokens has T - 1 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import PromptAltTokens, TensorData, TopkTable
from twinkle.server.samplers.protocol import GenerateRequest

# Separates the stream of a prompt's alternatives from those of samples.
_ALTERNATIVES = 1


@dataclass(frozen=True, eq=False)
class PromptAnswers:
    """The fields of `SampleResponse` about the prompt; None if not requested."""

    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkTable | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None


def asks_about_prompt(request: GenerateRequest) -> bool:
    return bool(
        request.prompt_logprobs
        or request.topk_prompt_logprobs
        or request.prompt_alt_tokens_k
        or request.target_tokens is not None
    )


def check_targets(request: GenerateRequest, vocab_size: int) -> None:
    """
    Raises:
        InvalidRequest: if the targets don't fit prompt and vocabulary, which on a GPU would end the process.
    """
    targets = request.target_tokens
    if targets is None:
        return
    rows = len(request.prompt) - 1
    if targets.ndim != 2 or len(targets) != rows:
        raise InvalidRequest(
            f"target_prompt_logprobs: shape {list(targets.shape)}; it must be [{rows}, K], a row for each prompt token "
            "after the first"
        )
    if targets.size and not -1 <= targets.min() <= targets.max() < vocab_size:
        raise InvalidRequest(
            f"target_prompt_logprobs: must be token ids from 0 to {vocab_size - 1}, or -1 where nothing is asked for"
        )


def first_listed_row(request: GenerateRequest, rows: int) -> int:
    """The first row of `prompt_logprobs` and `topk_prompt_logprobs`; `rows` if there is none."""
    if not (request.prompt_logprobs or request.topk_prompt_logprobs):
        return rows
    last_n = request.prompt_logprobs_last_n
    return 0 if last_n is None else max(0, rows - last_n)


def first_target_row(request: GenerateRequest, rows: int) -> int:
    """The first row that has a target; `rows` if there is none."""
    if request.target_tokens is None:
        return rows
    asking = np.flatnonzero((request.target_tokens >= 0).any(axis=1))
    return int(asking[0]) if len(asking) else rows


def alternatives_generator(seed: int) -> np.random.Generator:
    """Uniform numbers for a prompt's alternatives, a function of the seed alone; separate from samples' streams."""
    entropy = np.random.SeedSequence(seed % 2**64, spawn_key=(_ALTERNATIVES,))
    return np.random.Generator(np.random.Philox(entropy))
