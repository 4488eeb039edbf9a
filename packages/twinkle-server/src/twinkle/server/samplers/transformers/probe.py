"""Which kind of batch works for a model: found at start-up by sampling two tokens.

Models differ in the caches and masks that they accept, and not all of them say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf.base_model import LOADING_ERRORS, agree
from twinkle.server.samplers.transformers.batches import Batch
from twinkle.server.samplers.transformers.model_runner import Prompt

_TOKENS = (1, 2, 3, 1, 2)
_PROMPT = 3


def first_working(model: PreTrainedModel, makers: Sequence[Callable[[], Batch]]) -> int:
    """The index of the first batch with the same logits as the model without a cache.

    Raises:
        InvalidRequest: if there is none, with what happened to the last.
    """
    with torch.inference_mode():
        tokens = torch.tensor([_TOKENS], device=model.device)
        expected = cast("Tensor", model(input_ids=tokens, use_cache=False).logits)[0, _PROMPT - 1 :]
        problem = ""
        for i, make in enumerate(makers):
            try:
                found = _sampled(make())
            except LOADING_ERRORS as error:
                problem = next(iter(str(error).splitlines()), "") or type(error).__name__
                continue
            if agree(found, expected):
                return i
            problem = "its log-probabilities differ from those without a cache"
    raise InvalidRequest(
        f"model: {type(model).__name__} can't be sampled here: it takes none of the caches that there are "
        f"({problem[:300]}); use another model"
    )


def _sampled(batch: Batch) -> Tensor:
    """Logits after the prompt, and after each further token: [tokens, vocabulary]."""
    batch.add([Prompt("", np.array(_TOKENS[:_PROMPT], np.int64), None, rows=1)])
    logits = [batch.prefill()[1]]
    while not len(logits[-1]):
        logits.append(batch.prefill()[1])
    logits += [batch.step([token]) for token in _TOKENS[_PROMPT:]]
    batch.drop([0], cacheable=False)
    return torch.cat(logits)
