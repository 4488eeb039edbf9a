"""What running sequences take of the sampler's cache, in tokens. No torch.

The unit is what a short sequence's token takes in all layers. In a layer with a sliding window a sequence takes no more
than the window; for layers with states (linear attention) it takes the same whatever its length (`RowCost`).

Sequences that go through the model together are padded to the longest of them: a bucket of them takes rows x longest.
Short and long ones are in different buckets, so that one long sequence does not make sixty short ones cost as much as
itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

# How many rope boundaries a bucket's sequences are beyond, and whether they are long.
BucketKey: TypeAlias = tuple[int, bool]

UNBOUNDED = 2**62

# This share of the tokens, as a divisor, is for short sequences whatever the long ones take.
_FOR_SHORT = 4
# This share is left free, as a divisor, by tenants that have something running already: what runs grows.
_TO_GROW = 16


@dataclass(frozen=True)
class RowCost:
    """What one sequence takes.

    Attributes:
        growing: bytes of each token.
        windowed: bytes of each of the last `window` tokens, besides.
        constant: bytes of its states.
    """

    growing: int = 1
    windowed: int = 0
    window: int = 0
    constant: int = 0

    @property
    def _unit(self) -> int:
        """Bytes of a token; where none takes any, of the states."""
        return self.growing + self.windowed or max(1, self.constant)

    def tokens(self, length: int) -> int:
        """What a sequence of this length takes."""
        size = self.growing * length + self.windowed * min(length, self.window) + self.constant
        return -(-size // self._unit)

    def longest(self, tokens: int) -> int:
        """The length of the longest sequence that takes no more than so many tokens; `UNBOUNDED` if any does."""
        left = tokens * self._unit - self.constant
        within = left // max(1, self.growing + self.windowed)
        if left < 0 or (self.windowed and within < self.window):
            return max(0, within)
        return (left - self.windowed * self.window) // self.growing if self.growing else UNBOUNDED

    def size(self, tokens: int) -> int:
        """Bytes of so many tokens."""
        return tokens * self._unit

    def affordable(self, size: int) -> int:
        """How many tokens fit into so many bytes."""
        return size // self._unit


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        rows: most sequences at a time.
        tokens: most that they may take together.
        alone: most that a sequence may take: while its prompt is moved from where it was prefilled, it is there twice.
        bytes: most of all caches, with what they have beyond what is needed, so that growing is rare.
        prefix_tokens: most that are kept of sequences that have ended, besides.
        boundaries: lengths beyond which a sequence is computed with other rope frequencies, rising. All sequences of a
            bucket are computed with the same ones.
        per_sequence: whether each sequence is charged for its own length alone, since none are padded.
    """

    rows: int
    tokens: int
    boundaries: tuple[int, ...] = ()
    per_sequence: bool = False
    cost: RowCost = RowCost()
    alone: int = UNBOUNDED
    bytes: int = UNBOUNDED
    prefix_tokens: int = 2**14

    @property
    def longest(self) -> int:
        """The length of the longest sequence that there is room for."""
        return self.cost.longest(min(self.tokens, self.alone))

    @cached_property
    def short(self) -> int:
        """Sequences of at most so many tokens always have room, as far as there are rows."""
        return self.cost.longest(self.tokens // self.rows)

    def rope_regime(self, length: int) -> int:
        """How many boundaries a sequence of so many tokens is beyond."""
        return bisect_left(self.boundaries, length)

    def bucket(self, length: int) -> BucketKey:
        return self.rope_regime(length), length > self.short


@dataclass
class CacheUsage:
    """The rows of each bucket, and the longest of them."""

    limits: Limits
    rows: int = 0
    _buckets: dict[BucketKey, tuple[int, int]] = field(default_factory=dict[BucketKey, tuple[int, int]])
    _unpadded: int = 0

    @classmethod
    def of(cls, limits: Limits, lengths: Iterable[int]) -> CacheUsage:
        """Of a row of each length."""
        usage = cls(limits)
        for length in lengths:
            usage.add(length)
        return usage

    def add(self, length: int, rows: int = 1) -> None:
        self.rows += rows
        if self.limits.per_sequence:
            self._unpadded += rows * self.limits.cost.tokens(length)
            return
        key = self.limits.bucket(length)
        old_rows, longest = self._buckets.get(key, (0, 0))
        self._buckets[key] = old_rows + rows, max(longest, length)

    @property
    def tokens(self) -> int:
        """What is charged; at most `limits.tokens` may be. A quarter as many of short sequences costs nothing."""
        if self.limits.per_sequence:
            return self._unpadded
        cost = self.limits.cost
        sizes = {key: rows * cost.tokens(longest) for key, (rows, longest) in self._buckets.items()}
        short = sum(size for (_, is_long), size in sizes.items() if not is_long)
        return sum(sizes.values()) - min(short, self.limits.tokens // _FOR_SHORT)

    @property
    def is_too_much(self) -> bool:
        return self.tokens > self.limits.tokens

    def fitting(self, length: int, most: int, may_fill: bool) -> int:
        """How many rows of a length there is room for, at most so many.

        Args:
            may_fill: whether nothing need be left for running sequences to grow into.
        """
        limit = self.limits.tokens
        if self.rows and not may_fill:
            limit -= limit // _TO_GROW
        count = min(most, self.limits.rows - self.rows)
        while count > 0 and self._with(length, count).tokens > limit:
            count -= 1
        return max(0, count)

    def _with(self, length: int, rows: int) -> CacheUsage:
        more = CacheUsage(self.limits, self.rows, dict(self._buckets), self._unpadded)
        more.add(length, rows)
        return more
