"""Prompts that are being read, piece by piece, so that those who generate needn't wait for the end of a long one.

Each has a row in a cache of its own kind until it has been read whole. Where it begins as another one did, of the same
tenant and adapter, that beginning is copied; if the other is still being read, it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.lora import ResidentAdapter, RouteGroup
from twinkle.server.samplers.transformers.model_runner import PADDING, Network, Prompt
from twinkle.server.samplers.transformers.prefix_cache import LEAST_COMMON, common_length

# What is known of a prompt's beginning elsewhere: see `Prefixes.find`.
Find: TypeAlias = Callable[[Prompt], tuple[int, list[Tensor]]]


@dataclass(eq=False)
class Reading:
    """
    Attributes:
        position: tokens that have been read.
        leader: one that came before, begins alike and is waited for until it has read the common tokens.
    """

    prompt: Prompt
    position: int = 0
    leader: Reading | None = None
    common: int = 0

    @property
    def left(self) -> int:
        return len(self.prompt.tokens) - self.position

    @property
    def sharable(self) -> int:
        """So many tokens may be taken over: the last one is read for what follows it, and so is whatever is asked
        about.
        """
        scores = self.prompt.scores
        last = len(self.prompt.tokens) - 1
        return last if scores is None else min(last, scores.first_row)


@dataclass(eq=False)
class Read:
    """A prompt that has been read whole.

    Attributes:
        hidden: of its last token [hidden].
        contents: see `SlotCache.row`; as long as the reader isn't used again.
    """

    prompt: Prompt
    hidden: Tensor
    contents: list[Tensor]


class Reader:
    """Row i of its cache is the i-th of those that are being read; others wait for their leaders."""

    def __init__(self, network: Network, boundary: int = 0) -> None:
        """
        Args:
            boundary: prompts are longer than this, and the model is to know it from the first piece on: see
                `rope_boundaries`. 0 if there is none to know of.
        """
        self._network = network
        self._boundary = boundary
        self._cache = SlotCache(network.num_layers, padding_position=boundary)
        self._readings: list[Reading] = []
        self._waiting: list[Reading] = []
        self._route: list[RouteGroup] | None = None  # made anew when the readings change

    @property
    def prompts(self) -> list[Prompt]:
        return [reading.prompt for reading in (*self._readings, *self._waiting)]

    @property
    def adapters(self) -> AbstractSet[ResidentAdapter | None]:
        return {prompt.adapter for prompt in self.prompts}

    def add(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            reading = Reading(prompt)
            self._find_leader(reading, [*self._readings, *self._waiting])
            self._waiting.append(reading)

    def remove(self, prompts: AbstractSet[Prompt]) -> None:
        """Stop reading these."""
        for row in reversed(range(len(self._readings))):
            if self._readings[row].prompt in prompts:
                self._take_out(row)
        self._waiting = [reading for reading in self._waiting if reading.prompt not in prompts]
        for i, reading in enumerate(self._waiting):
            if reading.leader is not None and reading.leader.prompt in prompts:
                self._find_leader(reading, [*self._readings, *self._waiting[:i]])
        if not self._readings:
            self._cache.clear()

    def read(self, tokens: int, find: Find) -> list[Read]:
        """Read a piece of every prompt that isn't waiting, of so many tokens together, if it can be.

        Returns:
            Those that have been read whole; they are to be removed then.
        """
        self._start(find)
        count = len(self._readings)
        n = min(max(1, tokens // count), max(reading.left for reading in self._readings))
        starts = [reading.position for reading in self._readings]
        self._cache.reserve(count, max(starts) + n + 1)
        hidden = self._forward(n, starts)[:, :n]
        for i, reading in enumerate(self._readings):
            self._network.read_scores(reading.prompt, hidden[i], starts[i])
        finished: list[Read] = []
        for row, reading in enumerate(self._readings):
            left, reading.position = reading.left, min(reading.position + n, len(reading.prompt.tokens))
            if left <= n:
                contents = self._cache.row(row, reading.position)
                finished.append(Read(reading.prompt, hidden[row, left - 1], contents))
        return finished

    def _start(self, find: Find) -> None:
        """Give rows to those that needn't wait any more, and what is known of their beginnings."""
        still_waiting: list[Reading] = []
        for reading in self._waiting:
            leader = reading.leader
            if leader is not None and leader.position < reading.common:
                still_waiting.append(reading)
                continue
            common, contents = find(reading.prompt)
            row = len(self._readings)
            self._cache.reserve(row + 1, max(common, reading.common))
            if leader in self._readings and reading.common > common:
                common = reading.common
                contents = self._cache.row(self._readings.index(leader), common)
            reading.position = min(common, reading.sharable)
            if reading.position < LEAST_COMMON:
                reading.position = 0
            else:
                begun = [content[:, : reading.position] for content in contents]
                self._cache.write_rows(slice(row, row + 1), begun)
            self._readings.append(reading)
            self._route = None
        self._waiting = still_waiting

    def _find_leader(self, reading: Reading, earlier: list[Reading]) -> None:
        reading.leader, reading.common = None, 0
        for other in earlier:
            if other.prompt.owner != reading.prompt.owner:
                continue
            common = min(common_length(reading.prompt.tokens, other.prompt.tokens), reading.sharable)
            if common >= LEAST_COMMON and common > reading.common:
                reading.leader, reading.common = other, common

    def _take_out(self, row: int) -> None:
        """The last row moves into its place."""
        last = len(self._readings) - 1
        if row != last:
            moved = self._readings[row] = self._readings[last]
            self._cache.write_rows(slice(row, row + 1), self._cache.row(last, moved.position))
        self._readings.pop()
        self._route = None

    def _forward(self, n: int, starts: list[int]) -> Tensor:
        """The next n tokens of every reading, and padding behind the ends of those that have fewer left.

        Where all are before the boundary still, one more column of padding stands beyond it.
        """
        network = self._network
        width = n if max(starts) + n > self._boundary or not self._boundary else n + 1
        tokens = torch.full((len(starts), width), PADDING)
        for row, reading in zip(tokens, self._readings, strict=True):
            own = reading.prompt.tokens[reading.position : reading.position + n]
            row[: len(own)] = torch.from_numpy(own.copy())
        if self._route is None:
            self._route = network.routes.make([reading.prompt.adapter for reading in self._readings])
        network.route.groups = self._route
        return network.forward(self._cache, slice(0, len(starts)), tokens.to(network.device), starts)
