"""The running batch, as far as the model is concerned: rows with keys and values, prompts in, logits out.

`SlotBatch` holds many sequences of different lengths in one `SlotCache`. `SingleBatch` holds the samples of one prompt
in Transformers' own cache, for models whose layers are not all full attention (sliding windows, linear attention):
slower, since requests follow each other, but the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from twinkle.protocol.types import Int64Array
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.lora import ResidentAdapter, RouteGroup
from twinkle.server.samplers.transformers.network import Network, Prompt
from twinkle.server.samplers.transformers.prefixes import Prefixes, common_length
from twinkle.server.samplers.transformers.reading import Read, Reader

# Tokens of prompts in one forward pass; longer ones are read piece by piece.
PREFILL_TOKENS = 2048
# As many while others generate: between two of their tokens lies one such pass.
PREFILL_TOKENS_BETWEEN = 512


class Batch(Protocol):
    """Rows 0, 1, 2, ... of running sequences, and prompts on their way there."""

    max_rows: int

    @property
    def rows(self) -> int: ...

    def add(self, prompts: Sequence[Prompt]) -> None:
        """These are to be read."""
        ...

    def read(self) -> tuple[list[Prompt], Tensor]:
        """Read on, a piece at most. If it raises, what was being read is to be forgotten; nothing else has changed.

        Returns:
            The prompts that have been read whole, and the logits [new rows, vocabulary] of the next tokens of their
            rows, which stand behind those that there were, prompt by prompt.
        """
        ...

    def forget(self, prompts: AbstractSet[Prompt]) -> None:
        """Stop reading these."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; returns logits [rows, vocabulary]. All or nothing."""
        ...

    def drop(self, rows: Sequence[int], known: AbstractSet[int]) -> list[int]:
        """Take rows out.

        Args:
            known: those of them that later prompts may begin like.

        Returns:
            For each row that there is then, which one it was before.
        """
        ...

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        """It has gone: nothing is kept for later prompts that would use it."""
        ...

    def free_memory(self) -> None:
        """Let go of what is only kept for later."""
        ...


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


class SlotBatch:
    """Many sequences in one cache."""

    def __init__(self, network: Network, max_rows: int, max_known_tokens: int) -> None:
        """
        Args:
            max_known_tokens: of sequences that have ended, for later prompts that begin like them.
        """
        self.max_rows = max_rows
        self._network = network
        self._cache = SlotCache(network.num_layers)
        self._rows: list[Row] = []
        self._route: list[RouteGroup] | None = None  # made anew when the rows change
        self._reader = Reader(network)
        self._known = Prefixes(max_known_tokens)

    @property
    def rows(self) -> int:
        return len(self._rows)

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._reader.add(prompts)

    def forget(self, prompts: AbstractSet[Prompt]) -> None:
        self._reader.remove(prompts)

    def read(self) -> tuple[list[Prompt], Tensor]:
        network = self._network
        read = self._reader.read(PREFILL_TOKENS_BETWEEN if self._rows else PREFILL_TOKENS, self._find)
        if not read:
            return [], torch.empty(0)
        prompts = [one.prompt for one in read]
        network.route.groups = network.routes.make([prompt.adapter for prompt in prompts])
        logits = network.logits(torch.stack([one.hidden for one in read]).unsqueeze(1)).squeeze(1)
        self._begin_rows(read)
        self._reader.remove(set(prompts))
        self._rows_changed()
        counts = torch.tensor([prompt.rows for prompt in prompts], device=logits.device)
        return prompts, logits.repeat_interleave(counts, dim=0)

    def _begin_rows(self, read: list[Read]) -> None:
        rows = [Row(one.prompt) for one in read for _ in range(one.prompt.rows)]
        self._cache.reserve(self.rows + len(rows), max(row.length for row in (*self._rows, *rows)) + 1)
        first = self.rows
        for one in read:
            self._cache.write_rows(list(range(first, first + one.prompt.rows)), one.contents)
            first += one.prompt.rows
        self._rows += rows

    def _find(self, prompt: Prompt) -> tuple[int, list[Tensor]]:
        """What is known of a prompt's beginning: from sequences that have ended, or from prompts of running ones."""
        best, contents = self._known.find(prompt.owner, prompt.tokens)
        found: int | None = None
        for i, row in enumerate(self._rows):
            if row.prompt.owner == prompt.owner:
                common = common_length(prompt.tokens, row.prompt.tokens)
                if common > best:
                    best, found = common, i
        return best, contents if found is None else self._cache.row(found, best)

    def step(self, tokens: Sequence[int]) -> Tensor:
        network = self._network
        lengths = [row.length for row in self._rows]
        self._cache.reserve(len(lengths), max(lengths) + 1)
        if self._route is None:
            self._route = network.routes.make([row.prompt.adapter for row in self._rows])
        network.route.groups = self._route
        newest = torch.tensor(tokens, device=network.device).unsqueeze(1)
        hidden = network.forward(self._cache, slice(0, len(lengths)), newest, lengths)
        logits = network.logits(hidden).squeeze(1)
        for row, token in zip(self._rows, tokens, strict=True):
            row.generated.append(token)
        return logits

    def drop(self, rows: Sequence[int], known: AbstractSet[int]) -> list[int]:
        for row in known:
            dropped = self._rows[row]
            self._known.add(dropped.prompt.owner, dropped.tokens, self._cache.row(row, dropped.length))
        order = list(range(self.rows))
        for row in sorted(rows, reverse=True):
            last = len(order) - 1
            if row != last:
                order[row], self._rows[row] = order[last], self._rows[last]
                self._cache.write_rows([row], self._cache.row(last, self._rows[last].length))
            order.pop()
            self._rows.pop()
        if not order:
            self._cache.clear()
        self._rows_changed()
        return order

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        self._known.forget(adapter)

    def free_memory(self) -> None:
        self._known.clear()

    def _rows_changed(self) -> None:
        self._route = None
        self._network.routes.keep({row.prompt.adapter for row in self._rows} | self._reader.adapters)


class SingleBatch:
    """The samples of one prompt, in Transformers' own cache. Rows that ended are computed on until all have."""

    max_rows = 16

    def __init__(self, network: Network) -> None:
        self._network = network
        self._cache: DynamicCache | None = None
        self._to_read: list[Prompt] = []
        self._route: list[RouteGroup] = []
        self._length = 0
        self._live: list[int] = []
        self._width = 0

    @property
    def rows(self) -> int:
        return len(self._live)

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._to_read += prompts

    def forget(self, prompts: AbstractSet[Prompt]) -> None:
        self._to_read = [prompt for prompt in self._to_read if prompt not in prompts]

    def read(self) -> tuple[list[Prompt], Tensor]:
        [prompt] = self._to_read
        network = self._network
        tokens = torch.from_numpy(prompt.tokens.copy()).to(network.device).expand(prompt.rows, -1)
        cache = DynamicCache(config=network.config.get_text_config())
        route = network.routes.make([prompt.adapter] * prompt.rows)
        network.route.groups = route
        positions = torch.arange(tokens.shape[1], device=network.device).unsqueeze(0)
        hidden = network.body(tokens, positions, None, cache)
        logits = network.logits(hidden[:, -1:]).squeeze(1)
        network.read_scores(prompt, hidden[0], 0)
        self._cache, self._route = cache, route
        self._length, self._width = tokens.shape[1], prompt.rows
        self._live = list(range(prompt.rows))
        self._to_read = []
        return [prompt], logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        # A cache that a failed step has half written can't be used again, so this batch's steps are not retried.
        network = self._network
        all_tokens = torch.zeros(self._width, 1, dtype=torch.int64)
        all_tokens[self._live, 0] = torch.tensor(tokens)
        positions = torch.full((1, 1), self._length, device=network.device)
        network.route.groups = self._route
        hidden = network.body(all_tokens.to(network.device), positions, None, self._cache)
        self._length += 1
        return network.logits(hidden).squeeze(1)[self._live]

    def drop(self, rows: Sequence[int], known: AbstractSet[int]) -> list[int]:
        kept = [row for row in range(self.rows) if row not in set(rows)]
        self._live = [self._live[row] for row in kept]
        if not self._live:
            self._cache = None
        return kept

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        """Nothing is kept anyway."""

    def free_memory(self) -> None:
        """Nothing is kept anyway."""


def make_batch(network: Network, max_rows: int, max_known_tokens: int) -> Batch:
    """The batch that fits the model's layers."""
    text = network.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if kinds == {"full_attention"} and not (windowed and getattr(text, "layer_types", None) is None):
        return SlotBatch(network, max_rows, max_known_tokens)
    return SingleBatch(network)
