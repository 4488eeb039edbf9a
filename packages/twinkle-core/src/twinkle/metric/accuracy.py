"""How often a model is right."""

import math
from collections.abc import Sequence

import numpy as np

from twinkle.arrays import as_mask
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import TopkRow


def token_accuracy(topk_rows: Sequence[TopkRow], tokens: Sequence[int], mask: object = None) -> float:
    """The share of tokens that are the model's most likely choice.

    Args:
        topk_rows: for each token the most likely (token id, log-probability) pairs, most likely first, as in
            `SampleResponse.topk_prompt_logprobs`; tokens with None (such as the first) don't count.
        tokens: token ids, [T].
        mask: which tokens count, bool [T]; default: all.

    Raises:
        InvalidRequest: if lengths differ, or no token counts.
    """
    if len(topk_rows) != len(tokens):
        raise InvalidRequest(
            f"topk_rows: {len(topk_rows)} rows for {len(tokens)} tokens; give all topk_prompt_logprobs of one prompt"
        )
    keep = np.ones(len(tokens), np.bool_) if mask is None else as_mask("mask", mask, "[T]")
    if len(keep) != len(tokens):
        raise InvalidRequest(
            f"mask: {len(keep)} entries for {len(tokens)} tokens; there must be one for each"
        )
    hits = [
        row[0][0] == token for row, token, kept in zip(topk_rows, tokens, keep, strict=True) if kept and row
    ]
    if not hits:
        raise InvalidRequest(
            "topk_rows: no token counts; at least one must have a row and be left in by the mask"
        )
    return float(np.mean(hits))


def answer_accuracy(rewards: object, threshold: float = 0.5) -> tuple[float, float]:
    """The share of rewards that reach the threshold, with its standard error.

    The error is the binomial sqrt(a * (1 - a) / N), which assumes independent answers; several samples of one prompt
    are less independent, so their true error is larger.

    Args:
        rewards: one per answer, of any shape.
        threshold: the lowest reward of a correct answer.

    Returns:
        (accuracy, standard error), both 0 to 1.

    Raises:
        InvalidRequest: if there is no reward, or one is NaN.
    """
    try:
        values = np.asarray(rewards, np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"rewards: not a rectangular array of numbers ({error})") from error
    if not values.size:
        raise InvalidRequest("rewards: none; accuracy needs at least one answer")
    if np.isnan(values).any():
        raise InvalidRequest(
            f"rewards: entry {int(np.argmax(np.isnan(values)))} is NaN; every answer needs a reward"
        )
    accuracy = float((values >= threshold).mean())
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / values.size)
