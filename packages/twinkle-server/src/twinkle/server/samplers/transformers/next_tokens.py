"""Draws the next token of many sequences from their logits."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import cast

import torch
from torch import Tensor

from twinkle.protocol.types import TopkTable
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.samplers.transformers.draw import DrawSettings, draw, tempered_logprobs, topk_table
from twinkle.server.samplers.transformers.sequences import Sequence


class NextTokens:
    """Draws; keeps the last draw's settings, since most steps are for the same sequences."""

    def __init__(self) -> None:
        self._latest: tuple[Several[Sequence], DrawSettings] | None = None

    def append(self, sequences: tuple[Sequence, ...], logits: Tensor) -> None:
        """Draw a token for each sequence, and append it there.

        Args:
            logits: [sequences, vocabulary].
        """
        settings = self._settings(sequences, logits)
        uniforms = torch.tensor([s.uniforms.next() for s in sequences], dtype=torch.float64)
        logprobs = tempered_logprobs(logits, settings)
        tokens = draw(logprobs, settings, to_device(uniforms, logits.device))
        chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        # One transfer for both; in float64 both are what they are.
        drawn, their_logprobs = cast(
            "list[list[float]]", torch.stack((tokens.double(), chosen.double())).tolist()
        )
        for sequence, token, logprob in zip(sequences, drawn, their_logprobs, strict=True):
            sequence.tokens.append(int(token))
            sequence.logprobs.append(logprob)
        _list_likeliest(sequences, logprobs)

    def _settings(self, sequences: tuple[Sequence, ...], logits: Tensor) -> DrawSettings:
        if self._latest is None or self._latest[0] is not sequences:
            params = [sequence.task.request.params for sequence in sequences]
            self._latest = (sequences, DrawSettings.of(params, logits.shape[-1], logits.device))
        return self._latest[1]


def _list_likeliest(sequences: tuple[Sequence, ...], logprobs: Tensor) -> None:
    """List the likeliest tokens for requests that ask for them."""
    most = max(sequence.task.request.topk_sample_logprobs for sequence in sequences)
    if most == 0:
        return
    best = topk_table(*logprobs.topk(most, dim=-1))
    for i, sequence in enumerate(sequences):
        if k := sequence.task.request.topk_sample_logprobs:
            # Copies: a row must not keep all others' memory alive.
            ids, values = best.token_ids[i : i + 1, :k].copy(), best.logprobs[i : i + 1, :k].copy()
            sequence.topk.append(TopkTable(ids, values))
