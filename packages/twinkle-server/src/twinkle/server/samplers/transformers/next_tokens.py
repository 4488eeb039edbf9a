"""Draws the next token of many sequences from their logits."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import cast

import torch
from torch import Tensor

from twinkle.protocol.types import TopkTable
from twinkle.server.backends.hf.device_memory import is_out_of_memory
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
        uniforms = torch.tensor([s.uniforms.next() for s in sequences], dtype=torch.float64)
        self._append(sequences, logits, uniforms)

    def _append(self, sequences: tuple[Sequence, ...], logits: Tensor, uniforms: Tensor) -> None:
        try:
            drawn = self._drawn(sequences, logits, uniforms)
        except Exception as error:
            if not is_out_of_memory(error) or len(sequences) == 1:
                raise
            drawn = None  # and the frames that hold its tensors are gone
        if drawn is None:
            half = len(sequences) // 2
            self._append(sequences[:half], logits[:half], uniforms[:half])
            self._append(sequences[half:], logits[half:], uniforms[half:])
            return
        tokens, logprobs, best = drawn
        for i, sequence in enumerate(sequences):
            sequence.tokens.append(int(tokens[i]))
            sequence.logprobs.append(logprobs[i])
            if (k := sequence.task.request.topk_sample_logprobs) and best is not None:
                # Copies: a row must not keep all others' memory alive.
                ids, values = best.token_ids[i : i + 1, :k].copy(), best.logprobs[i : i + 1, :k].copy()
                sequence.topk.append(TopkTable(ids, values))

    def _drawn(
        self, sequences: tuple[Sequence, ...], logits: Tensor, uniforms: Tensor
    ) -> tuple[list[float], list[float], TopkTable | None]:
        """By sequence: token, its log-probability, and the likeliest tokens if any request asks for them."""
        settings = self._settings(sequences, logits)
        logprobs = tempered_logprobs(logits, settings)
        tokens = draw(logprobs, settings, to_device(uniforms, logits.device))
        chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        # One transfer for both; in float64 both are what they are.
        drawn, their_logprobs = cast(
            "list[list[float]]", torch.stack((tokens.double(), chosen.double())).tolist()
        )
        most = max(sequence.task.request.topk_sample_logprobs for sequence in sequences)
        return drawn, their_logprobs, topk_table(*logprobs.topk(most, dim=-1)) if most else None

    def _settings(self, sequences: tuple[Sequence, ...], logits: Tensor) -> DrawSettings:
        if self._latest is None or self._latest[0] is not sequences:
            params = [sequence.task.request.params for sequence in sequences]
            self._latest = (sequences, DrawSettings.of(params, logits.shape[-1], logits.device))
        return self._latest[1]
