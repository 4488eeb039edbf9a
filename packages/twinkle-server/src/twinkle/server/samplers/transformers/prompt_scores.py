"""What a request wants to know about its prompt's tokens, computed during prefill; not about its samples.

Row i is the model's distribution over prompt token i + 1, so a prompt of T tokens has T - 1 rows. They come in order,
in pieces of any size, and only what was requested is kept of each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twinkle.protocol.types import Array, Float32Array, Int64Array, PromptAltTokens, TensorData, TopkTable
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.samplers.prompt_answers import (
    PromptAnswers,
    alternatives_generator,
    first_listed_row,
    first_target_row,
)
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.draw import draw_alternatives, topk_table


class PromptScores:
    """One reading of one prompt.

    Attributes:
        rows: T - 1.
        first_row: the first that anything is requested about; those before it are skipped.
    """

    def __init__(self, request: GenerateRequest, seed: int) -> None:
        """
        Args:
            seed: for the alternatives: with the same seed they are the same in every reading.
        """
        self.rows = len(request.prompt) - 1
        self._request = request
        self._next_tokens = request.prompt[1:]
        self._generator = alternatives_generator(seed)
        self._first_listed = first_listed_row(request, self.rows)
        self._first_target = first_target_row(request, self.rows)
        self.first_row = 0 if request.prompt_alt_tokens_k else min(self._first_listed, self._first_target)
        # Pieces [n, ...], in order, up to the last row. They stay on the model's device until the end: fetching
        # each would make a GPU wait.
        self._logprobs: list[Tensor] = []
        self._topk: list[TopkTable] = []
        self._targets: list[Tensor] = []
        self._alternatives: list[Tensor] = []
        self._alternatives_logprobs: list[Tensor] = []

    def read(self, first: int, logits: Tensor) -> None:
        """Add the rows from `first` on.

        Args:
            logits: [n, vocabulary], any float type.
        """
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        end = first + len(logprobs)
        if end > (start := max(first, self._first_listed)):
            self._list(start, logprobs[start - first :])
        if end > (start := max(first, self._first_target)):
            self._score_targets(start, logprobs[start - first :])
        if k := self._request.prompt_alt_tokens_k:
            uniforms = to_device(
                torch.from_numpy(self._generator.random((len(logprobs), k))), logprobs.device
            )
            tokens = draw_alternatives(logprobs, self._request.params.temperature, uniforms)
            self._alternatives.append(tokens)
            self._alternatives_logprobs.append(logprobs.gather(1, tokens))

    def answers(self) -> PromptAnswers:
        """The results, once all rows from `first_row` on have been read."""
        request = self._request
        targets = request.target_tokens
        return PromptAnswers(
            prompt_logprobs=self._listed_logprobs() if request.prompt_logprobs else None,
            topk_prompt_logprobs=self._listed_topk() if request.topk_prompt_logprobs else None,
            target_prompt_logprobs=(
                None if targets is None else TensorData(_float_rows(self._targets, targets.shape))
            ),
            prompt_alt_tokens=self._drawn_alternatives() if request.prompt_alt_tokens_k else None,
        )

    def _list(self, first: int, logprobs: Tensor) -> None:
        """Add the prompt's own tokens, and the likeliest ones."""
        if self._request.prompt_logprobs:
            own = _on_device(self._next_tokens[first : first + len(logprobs)], logprobs)
            self._logprobs.append(logprobs.gather(1, own.unsqueeze(1)).squeeze(1))
        if self._request.topk_prompt_logprobs:
            self._topk.append(topk_table(*logprobs.topk(self._request.topk_prompt_logprobs, dim=-1)))

    def _score_targets(self, first: int, logprobs: Tensor) -> None:
        assert self._request.target_tokens is not None
        targets = _on_device(self._request.target_tokens[first : first + len(logprobs)], logprobs)
        scores = logprobs.gather(1, targets.clamp(min=0))
        self._targets.append(scores.masked_fill(targets < 0, 0.0))

    def _listed_logprobs(self) -> list[float | None]:
        found = torch.cat(self._logprobs).tolist() if self._logprobs else []
        return [*([None] * (self.rows + 1 - len(found))), *found]

    def _listed_topk(self) -> TopkTable:
        listed = sum(len(piece) for piece in self._topk)
        unlisted = TopkTable.empty(self.rows + 1 - listed, self._request.topk_prompt_logprobs)
        return TopkTable.joined([unlisted, *self._topk])

    def _drawn_alternatives(self) -> PromptAltTokens:
        shape = (self.rows, self._request.prompt_alt_tokens_k)
        tokens = (
            torch.cat(self._alternatives).cpu().numpy() if self._alternatives else np.zeros(shape, np.int64)
        )
        return PromptAltTokens(
            TensorData(tokens), TensorData(_float_rows(self._alternatives_logprobs, shape))
        )


def _on_device(tokens: Int64Array, like: Tensor) -> Tensor:
    return to_device(
        torch.from_numpy(tokens.copy()), like.device
    )  # a copy: what was received may be read-only


def _float_rows(pieces: list[Tensor], shape: tuple[int, ...]) -> Float32Array:
    """Concatenated pieces as the last rows of a matrix of this shape; 0 above them."""
    matrix = np.zeros(shape, np.float32)
    if pieces:
        found: Array = torch.cat(pieces).cpu().numpy()
        matrix[shape[0] - len(found) :] = found
    return matrix
