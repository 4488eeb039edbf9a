"""Padding in recurrent layers: which of them can leave it out of their states.

A recurrent layer takes every token into its state, padding too. A gated delta net (Qwen3.5) writes nothing and forgets
nothing at tokens whose gates are closed, and so does a Mamba-2 mixer at those whose time step is 0: so their gates are
made minus infinity at padding, before the sigmoid or softplus. (Convolutions see padding only behind a row's own
tokens, and the cache keeps each row's own inputs.)
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from typing import cast

import torch
from torch import Tensor, nn


class Sharing(Enum):
    """How prompts of different lengths go through a model's layers together."""

    PADDED = "padded at the right"
    EVEN = "in passes of equally many tokens of each"
    # A Mamba-1 mixer reads several tokens only from a sequence's beginning on.
    WHOLE = "each in one pass, with others of its length"


class Padding:
    """Where the tokens of the current pass are padding."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None  # bool [rows, n]; None: there is none

    @contextmanager
    def at(self, mask: Tensor | None) -> Generator[None]:
        self.mask = mask
        try:
            yield
        finally:
            self.mask = None


class ClosedAtPadding(nn.Module):
    """A projection whose last columns are gates."""

    def __init__(self, base: nn.Module, columns: int | None, padding: Padding) -> None:
        """
        Args:
            columns: how many are gates; None: all.
        """
        super().__init__()
        self.base = base
        self._columns = columns
        self._padding = padding

    def forward(self, x: Tensor) -> Tensor:
        out = cast("Tensor", self.base(x))
        mask = self._padding.mask
        if mask is not None:
            gates = out if self._columns is None else out[..., -self._columns :]
            gates.masked_fill_(mask.unsqueeze(-1), -torch.inf)
        return out


def prompts_share(decoder: nn.Module, recurrent_layers: int, padding: Padding) -> Sharing:
    """Replace the gates of a decoder's recurrent layers; says what the model can do."""
    if not recurrent_layers:
        return Sharing.PADDED
    mixers = [module for module in decoder.modules() if _convolution(module) is not None]
    if any(hasattr(mixer, "dt_proj") and hasattr(mixer, "x_proj") for mixer in mixers):
        return Sharing.WHOLE
    gates = [_gates(mixer) for mixer in mixers]
    known = [found for found in gates if found is not None]
    if len(known) < max(len(gates), recurrent_layers):
        return Sharing.EVEN
    for mixer, found in zip(mixers, known, strict=True):
        for name, columns in found.items():
            setattr(mixer, name, ClosedAtPadding(getattr(mixer, name), columns, padding))
    return Sharing.PADDED


def _convolution(module: nn.Module) -> nn.Conv1d | None:
    found = next((child for name, child in module.named_children() if name in ("conv1d", "conv")), None)
    return found if isinstance(found, nn.Conv1d) else None


def _gates(mixer: nn.Module) -> dict[str, int | None] | None:
    """The projections that make a recurrent layer's gates, each with how many of its last columns; None: unknown.

    A layer that is a convolution alone has none.
    """
    if not hasattr(mixer, "A_log"):
        own = {name for name, _ in mixer.named_parameters(recurse=False)}
        return None if own or hasattr(mixer, "dt_bias") else {}
    for names in (("in_proj_b", "in_proj_a"), ("in_proj_ba",), ("b_proj", "a_proj")):
        if all(hasattr(mixer, name) for name in names) and hasattr(mixer, "dt_bias"):
            return dict.fromkeys(names)
    heads = getattr(mixer, "num_heads", None)
    least_step = getattr(mixer, "time_step_limit", (1.0,))[0]
    if hasattr(mixer, "in_proj") and heads == len(cast("Tensor", mixer.A_log)) and least_step == 0:
        return {"in_proj": heads}
    return None
