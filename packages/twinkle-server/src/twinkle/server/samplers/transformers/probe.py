"""Which kind of batch works for a model: found at start-up by sampling a few tokens of two sequences.

Models differ in the caches and masks that they accept, and not all of them say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf.base_model import LOADING_ERRORS, agree
from twinkle.server.samplers.cache_usage import RowCost
from twinkle.server.samplers.transformers.batches import Batch
from twinkle.server.samplers.transformers.model_runner import Prompt

# Sequences of different lengths, and how many of their tokens are drawn.
_SEQUENCES = ((1, 2, 3, 1, 2), (3, 2, 2, 1, 3, 1, 2))
_DRAWN = 2


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        index: of the first batch with the same logits as the model without a cache.
        cost: what a sequence takes in it.
        problem: what happened to the one before.
    """

    index: int
    cost: RowCost
    problem: str


def first_working(model: PreTrainedModel, makers: Sequence[Callable[[], Batch]]) -> Found:
    """
    Raises:
        InvalidRequest: if there is none, with what happened to the last.
    """
    with torch.inference_mode():
        expected = torch.cat([_alone(model, tokens) for tokens in _SEQUENCES])
        problem = ""
        for i, make in enumerate(makers):
            try:
                found, cost = _sampled(make())
            except LOADING_ERRORS as error:
                problem = next(iter(str(error).splitlines()), "") or type(error).__name__
                continue
            if agree(found, expected):
                return Found(i, cost, problem)
            problem = "its log-probabilities differ from those without a cache"
    raise InvalidRequest(
        f"model: {type(model).__name__} can't be sampled here: it takes none of the caches that there are "
        f"({problem[:300]}); use another model"
    )


def _alone(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Logits after the prompt, and after each further token, without a cache: [drawn + 1, vocabulary]."""
    logits = cast(
        "Tensor", model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
    )
    return logits[0, len(tokens) - _DRAWN - 1 :]


def _sampled(batch: Batch) -> tuple[Tensor, RowCost]:
    """The same of both sequences, by a batch that has them together; and what a row takes in it."""
    prompts = [Prompt("", np.array(tokens[:-_DRAWN], np.int64), None, rows=1) for tokens in _SEQUENCES]
    batch.add(prompts)
    order: list[Prompt] = []
    logits: dict[Prompt, list[Tensor]] = {prompt: [] for prompt in prompts}
    while len(order) < len(prompts):
        complete, of_rows = batch.prefill()
        for prompt, row in zip(complete, of_rows, strict=True):
            logits[prompt].append(row)
        order += complete
    sequence = dict(zip(prompts, _SEQUENCES, strict=True))
    for drawn in range(-_DRAWN, 0):
        of_rows = batch.step([sequence[prompt][drawn] for prompt in order])
        for prompt, row in zip(order, of_rows, strict=True):
            logits[prompt].append(row)
    cost = batch.row_cost()
    batch.drop(list(range(len(order))), cacheable=False)
    return torch.stack([row for prompt in prompts for row in logits[prompt]]), cost
