"""What is asked about prompts, in vLLM's words, and the answers.

vLLM gives a prompt's own tokens and the k likeliest (`prompt_logprobs`), and with its newer model runner the tokens of
one's choice (`prompt_logprob_token_ids`), from a row of one's choice on. What else there is to ask needs the whole
distribution: k is then the vocabulary, which is a lot to move, so prompts may only be short.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array, Float32Array, Int64Array, PromptAltTokens, TensorData, TopkTable
from twinkle.server.samplers.prompt_answers import (
    PromptAnswers,
    alternatives_generator,
    first_listed_row,
    first_target_row,
)
from twinkle.server.samplers.protocol import GenerateRequest

# Most log-probabilities in the whole distributions of a prompt's rows. vLLM makes Python objects of them, which takes a
# second for so many.
MAX_TABLE = 2**22

_ALL = -1


def check(request: GenerateRequest, vocab_size: int, scores_tokens: bool) -> None:
    """
    Raises:
        InvalidRequest: if the prompt is too long for what is asked.
    """
    rows = len(request.prompt) - 1
    if _width(request, scores_tokens) == _ALL and rows * vocab_size > MAX_TABLE:
        field = "prompt_alt_tokens_k" if request.prompt_alt_tokens_k else "target_prompt_logprobs"
        raise InvalidRequest(
            f"{field}: for prompts of up to {MAX_TABLE // vocab_size + 1} tokens with the vllm engine as it runs "
            f"here, this one has {rows + 1}; shorten the prompt, or let the server sample with sampler.engine: "
            "transformers"
        )


def questions(request: GenerateRequest, scores_tokens: bool) -> dict[str, Any]:
    """Arguments for vLLM's `SamplingParams`.

    Args:
        scores_tokens: whether vLLM has `prompt_logprob_token_ids`.
    """
    width = _width(request, scores_tokens)
    asked: dict[str, Any] = {} if width is None else {"prompt_logprobs": width}
    if scores_tokens and (chosen := _chosen(request)) is not None:
        asked |= {"prompt_logprob_token_ids": chosen[0], "prompt_logprob_start": chosen[1]}
    return asked


def answers(request: GenerateRequest, output: Any, seed: int, scores_tokens: bool) -> PromptAnswers:
    """From vLLM's `RequestOutput` for `questions`.

    Args:
        seed: for the alternatives.
    """
    return _Reader(request, output, seed, scores_tokens).answers()


def _width(request: GenerateRequest, scores_tokens: bool) -> int | None:
    """How many of the likeliest tokens vLLM is asked for at each row; None: nothing, not even the prompt's own."""
    rows = len(request.prompt) - 1
    if rows == 0:
        return None
    targets = first_target_row(request, rows) < rows
    if (request.prompt_alt_tokens_k and request.params.temperature > 0) or (targets and not scores_tokens):
        return _ALL
    if request.prompt_alt_tokens_k:
        return max(1, request.topk_prompt_logprobs)
    if request.topk_prompt_logprobs or (request.prompt_logprobs and not scores_tokens):
        return request.topk_prompt_logprobs
    return None


def _chosen(request: GenerateRequest) -> tuple[Int64Array, int] | None:
    """Tokens to score [rows - start, columns] and `start`: the prompt's own in the first column if they are asked for,
    then the targets; -1 scores nothing. None: nothing.
    """
    rows = len(request.prompt) - 1
    listed = first_listed_row(request, rows) if request.prompt_logprobs else rows
    targets = first_target_row(request, rows)
    start = min(listed, targets)
    if start == rows:
        return None
    columns: list[Int64Array] = []
    if request.prompt_logprobs:
        own = np.where(np.arange(rows) >= listed, request.prompt[1:], -1)
        columns.append(own[:, None].astype(np.int64))
    if targets < rows:
        assert request.target_tokens is not None
        columns.append(request.target_tokens)
    return np.ascontiguousarray(np.concatenate(columns, axis=1)[start:]), start


class _Reader:
    """The rows that vLLM has answered with.

    Row i of `_ids` and `_logprobs` has prompt token i + 1, then the likeliest, falling: [T - 1, 1 + k], or [T - 1, 0].
    """

    def __init__(self, request: GenerateRequest, output: Any, seed: int, scores_tokens: bool) -> None:
        self._request = request
        self._seed = seed
        self._rows = len(request.prompt) - 1
        self._listed = first_listed_row(request, self._rows)
        flat = output.prompt_logprobs
        ids, logprobs = ([], []) if flat is None else (flat.token_ids, flat.logprobs)
        shape = (self._rows, len(ids) // self._rows if self._rows else 0)
        self._ids = np.array(ids, np.int64).reshape(shape)
        self._logprobs = np.array(logprobs, np.float32).reshape(shape)
        self._chosen: Array | None = None
        if scores_tokens and (chosen := _chosen(request)) is not None:
            scores = np.asarray(output.prompt_token_id_logprobs, np.float32)
            self._chosen = np.zeros((self._rows, scores.shape[1]), np.float32)
            self._chosen[chosen[1] :] = np.where(chosen[0] < 0, 0.0, scores)

    def answers(self) -> PromptAnswers:
        request = self._request
        return PromptAnswers(
            prompt_logprobs=self._own() if request.prompt_logprobs else None,
            topk_prompt_logprobs=self._topk() if request.topk_prompt_logprobs else None,
            target_prompt_logprobs=None if request.target_tokens is None else TensorData(self._targets()),
            prompt_alt_tokens=self._alternatives() if request.prompt_alt_tokens_k else None,
        )

    def _own(self) -> list[float | None]:
        column: Array = np.zeros(0, np.float32)
        if self._rows:
            column = (
                self._logprobs[:, 0]
                if self._logprobs.shape[1] or self._chosen is None
                else self._chosen[:, 0]
            )
        return [*([None] * (self._listed + 1)), *column[self._listed :].tolist()]

    def _topk(self) -> TopkTable:
        k = self._request.topk_prompt_logprobs
        table = TopkTable.empty(self._rows + 1, k)
        if self._rows:
            table.token_ids[self._listed + 1 :] = self._ids[self._listed :, 1 : 1 + k]
            table.logprobs[self._listed + 1 :] = self._logprobs[self._listed :, 1 : 1 + k]
        return table

    def _targets(self) -> Float32Array:
        targets = self._request.target_tokens
        assert targets is not None
        if first_target_row(self._request, self._rows) == self._rows:
            return np.zeros(targets.shape, np.float32)
        if self._chosen is not None:
            return self._chosen[:, -targets.shape[1] :].astype(np.float32)
        scores = np.take_along_axis(self._by_token(), np.maximum(targets, 0), 1)
        return np.where(targets < 0, 0.0, scores).astype(np.float32)

    def _alternatives(self) -> PromptAltTokens:
        shape = (self._rows, self._request.prompt_alt_tokens_k)
        if not self._rows:
            tokens, logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        elif (temperature := self._request.params.temperature) == 0:
            tokens = np.repeat(self._ids[:, 1:2], shape[1], axis=1)
            logprobs = np.repeat(self._logprobs[:, 1:2], shape[1], axis=1)
        else:
            plain = self._by_token()
            tokens = _draw(plain, temperature, alternatives_generator(self._seed).random(shape))
            logprobs = np.take_along_axis(plain, tokens, 1)
        return PromptAltTokens(TensorData(tokens), TensorData(logprobs))

    def _by_token(self) -> Float32Array:
        """Each row's whole distribution [T - 1, vocabulary], by token."""
        plain = np.full((self._rows, int(self._ids.max()) + 1), -np.inf, np.float32)
        np.put_along_axis(plain, self._ids, self._logprobs, 1)
        return plain


def _draw(logprobs: Float32Array, temperature: float, uniforms: Array) -> Int64Array:
    """Several tokens per row, with replacement, by inverting the cumulative distribution.

    Args:
        logprobs: [rows, vocabulary], of the plain distribution.
        temperature: of the draws, above 0.
        uniforms: float64 [rows, k] in [0, 1).
    """
    tempered = logprobs.astype(np.float64) / temperature
    cumulative = np.exp(tempered - tempered.max(axis=1, keepdims=True)).cumsum(axis=1)
    last = logprobs.shape[1] - 1
    drawn = [
        np.searchsorted(row, u * row[-1], side="right") for row, u in zip(cumulative, uniforms, strict=True)
    ]
    return np.minimum(np.stack(drawn), last).astype(np.int64)
