"""Sequences of different lengths that go through the model together, and the prompts on their way to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from twinkle.protocol.types import Int64Array
from twinkle.server.samplers.cache_usage import Limits, Place
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.lora import RouteGroup
from twinkle.server.samplers.transformers.model_runner import Network, Prompt
from twinkle.server.samplers.transformers.prefill import Read, Reader


@dataclass(eq=False)
class Row:
    """A running sequence.

    Attributes:
        generated: tokens after the prompt that have been read.
    """

    prompt: Prompt
    generated: list[int] = field(default_factory=list[int])

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.generated)

    @property
    def tokens(self) -> Int64Array:
        return np.concatenate([self.prompt.tokens, np.array(self.generated, np.int64)])


class Shelf:
    """Sequences in one rectangle (see `load`), row i of the cache is the i-th; prompts on their way there."""

    def __init__(self, network: Network, limits: Limits, place: Place) -> None:
        kind, self.is_long = place
        self.kind = kind
        self.place = place
        self.cache = SlotCache(network.num_layers)
        self.reader = Reader(network, limits.boundaries[kind - 1] if kind else 0)
        self.rows: list[Row] = []
        self._network = network
        self._route: list[RouteGroup] | None = None  # made anew when the rows change

    def begin(self, read: list[Read]) -> list[Row]:
        """Rows for prompts that have been read."""
        rows = [Row(one.prompt) for one in read for _ in range(one.prompt.rows)]
        self.cache.reserve(len(self.rows) + len(rows), max(row.length for row in (*self.rows, *rows)) + 1)
        first = len(self.rows)
        for one in read:
            end = first + one.prompt.rows
            self.cache.write_rows(slice(first, end), one.contents)
            first = end
        self.rows += rows
        self._route = None
        return rows

    def step(self, tokens: list[int]) -> Tensor:
        """Logits [rows, vocabulary] after one more token each, which the rows don't have yet."""
        network = self._network
        lengths = [row.length for row in self.rows]
        self.cache.reserve(len(lengths), max(lengths) + 1)
        if self._route is None:
            self._route = network.routes.make([row.prompt.adapter for row in self.rows])
        network.route.groups = self._route
        newest = torch.tensor(tokens, device=network.device).unsqueeze(1)
        hidden = network.forward(self.cache, slice(0, len(lengths)), newest, lengths)
        return network.logits(hidden).squeeze(1)

    def take_over(self, row: Row, other: Shelf) -> None:
        """A row of another shelf is here from now on."""
        place = len(self.rows)
        self.cache.reserve(place + 1, max(one.length for one in (*self.rows, row)) + 1)
        contents = other.cache.row(other.rows.index(row), row.length)
        self.cache.write_rows(slice(place, place + 1), contents)
        self.rows.append(row)
        self._route = None
        other.take_out(row)

    def take_out(self, row: Row) -> None:
        """The last row moves into its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            self.cache.write_rows(slice(place, place + 1), self.cache.row(last, self.rows[last].length))
            self.rows[place] = self.rows[last]
        self.rows.pop()
        self._route = None

    def trim(self) -> None:
        """Give back memory that isn't needed any more."""
        if self.rows:
            self.cache.trim(len(self.rows), max(row.length for row in self.rows) + 1)
        else:
            self.cache.clear()
