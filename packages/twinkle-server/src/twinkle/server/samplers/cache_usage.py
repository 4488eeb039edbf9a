"""What running sequences take of the sampler's KV cache, in tokens. No torch.

Sequences that go through the model together are padded to the longest of them: a bucket of them takes rows x longest.
Short and long ones are in different buckets, so that one long sequence does not make sixty short ones cost as much as
itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

# How many rope boundaries a bucket's sequences are beyond, and whether they are long.
BucketKey: TypeAlias = tuple[int, bool]

# This share of the tokens, as a divisor, is for short sequences whatever the long ones take.
_FOR_SHORT = 4
# This share is left free, as a divisor, by tenants that have something running already: what runs grows.
_TO_GROW = 16


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        rows: most sequences at a time.
        tokens: most tokens of them in the KV cache; no sequence may become longer.
        boundaries: lengths beyond which a sequence is computed with other rope frequencies, rising. All sequences of a
            bucket are computed with the same ones.
        per_sequence: whether each sequence is charged for its own length alone, since none are padded.
    """

    rows: int
    tokens: int
    boundaries: tuple[int, ...] = ()
    per_sequence: bool = False

    @property
    def short(self) -> int:
        """Sequences of at most so many tokens always have room, as far as there are rows."""
        return self.tokens // self.rows

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
            self._unpadded += rows * length
            return
        key = self.limits.bucket(length)
        old_rows, longest = self._buckets.get(key, (0, 0))
        self._buckets[key] = old_rows + rows, max(longest, length)

    @property
    def tokens(self) -> int:
        """What is charged; at most `limits.tokens` may be. A quarter as many of short sequences costs nothing."""
        if self.limits.per_sequence:
            return self._unpadded
        sizes = {key: rows * longest for key, (rows, longest) in self._buckets.items()}
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
