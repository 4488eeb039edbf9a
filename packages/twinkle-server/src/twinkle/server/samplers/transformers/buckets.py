"""Sequences that go through the model together, padded to the longest of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from twinkle.protocol.types import Int64Array
from twinkle.server.samplers.cache_usage import BucketKey, Limits
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.lora import RouteGroup
from twinkle.server.samplers.transformers.memory import CacheMemory
from twinkle.server.samplers.transformers.model_runner import ModelRunner, Prompt
from twinkle.server.samplers.transformers.prefill import Prefilled, PrefillQueue


@dataclass(eq=False)
class Row:
    """A running sequence.

    Attributes:
        generated: tokens after the prompt that have been through the model.
        is_broken: whether a pass has failed halfway, so that layers may keep what doesn't fit together.
    """

    prompt: Prompt
    generated: list[int] = field(default_factory=list[int])
    is_broken: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.generated)

    @property
    def tokens(self) -> Int64Array:
        return np.concatenate([self.prompt.tokens, np.array(self.generated, np.int64)])


class Bucket:
    """Row i of the cache is the i-th sequence's; `prefills` are the prompts being prefilled."""

    def __init__(self, runner: ModelRunner, limits: Limits, key: BucketKey, memory: CacheMemory) -> None:
        self.key = key
        self.rope_regime, self.is_long = key
        self.cache = SlotCache(runner.kinds, memory)
        self.prefills = PrefillQueue(
            runner, memory, limits.boundaries[self.rope_regime - 1] if self.rope_regime else 0
        )
        self.rows: list[Row] = []
        self._runner = runner
        self._route: list[RouteGroup] | None = None  # None: the rows have changed

    def begin(self, prefilled: list[Prefilled]) -> list[Row]:
        """Add rows for complete prompts."""
        rows = [Row(one.prompt) for one in prefilled for _ in range(one.prompt.rows)]
        self.cache.reserve(len(self.rows) + len(rows), max(row.length for row in (*self.rows, *rows)) + 1)
        first = len(self.rows)
        for one in prefilled:
            end = first + one.prompt.rows
            self.cache.write_rows(slice(first, end), one.contents)
            first = end
        self.rows += rows
        self._route = None
        return rows

    def step(self, tokens: list[int]) -> Tensor:
        """Logits [rows, vocabulary] after one more token each, which the rows don't include yet."""
        runner = self._runner
        lengths = [row.length for row in self.rows]
        self.cache.reserve(len(lengths), max(lengths) + 1)
        if self._route is None:
            self._route = runner.routes.make([row.prompt.adapter for row in self.rows])
        runner.route.groups = self._route
        newest = torch.tensor(tokens).unsqueeze(1)
        hidden = runner.forward(self.cache, slice(0, len(lengths)), newest, lengths)
        return runner.logits(hidden).squeeze(1)

    def move_in(self, row: Row, other: Bucket) -> None:
        """Move a row here from another bucket."""
        index = len(self.rows)
        self.cache.reserve(index + 1, max(one.length for one in (*self.rows, row)) + 1)
        contents = other.cache.row(other.rows.index(row), row.length)
        self.cache.write_rows(slice(index, index + 1), contents)
        self.rows.append(row)
        self._route = None
        other.take_out(row)

    def take_out(self, row: Row) -> None:
        """Remove a row; the last one moves into its place."""
        index, last = self.rows.index(row), len(self.rows) - 1
        if index != last:
            self.cache.write_rows(slice(index, index + 1), self.cache.row(last, self.rows[last].length))
            self.rows[index] = self.rows[last]
        self.rows.pop()
        self._route = None

    def trim(self) -> None:
        """Free memory that is no longer needed."""
        if self.rows:
            self.cache.trim(len(self.rows), max(row.length for row in self.rows) + 1)
        else:
            self.cache.clear()
