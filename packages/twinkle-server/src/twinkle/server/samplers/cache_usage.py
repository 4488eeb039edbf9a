"""What a running batch takes of the sampler's memory, in tokens whose keys and values are kept. No torch.

Sequences that go through the model together stand in one rectangle, rows x the longest of them. Short and long ones
have a rectangle each, so that one long sequence does not make sixty short ones cost as much as itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

# Which rectangle a sequence stands in: how many rope boundaries it is beyond, and whether it is long.
Place: TypeAlias = tuple[int, bool]

# So much of the tokens, as a divisor, is for short sequences whatever the long ones take.
_FOR_SHORT = 4
# As much is left free, as a divisor, by those who have something running already: those that run grow.
_TO_GROW = 16


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        rows: most sequences at a time.
        tokens: most tokens that are kept of them; no sequence may become longer.
        boundaries: lengths beyond which a sequence is computed with other rope frequencies, rising. What stands in one
            rectangle is computed with the same ones.
        are_apart: whether every prompt's samples have a rectangle of their own.
    """

    rows: int
    tokens: int
    boundaries: tuple[int, ...] = ()
    are_apart: bool = False

    @property
    def short(self) -> int:
        """Sequences of at most so many tokens always have room, as far as there are rows."""
        return self.tokens // self.rows

    def kind(self, length: int) -> int:
        """How many boundaries a sequence of so many tokens is beyond."""
        return bisect_left(self.boundaries, length)

    def place(self, length: int) -> Place:
        return self.kind(length), length > self.short


@dataclass
class Load:
    """Rows and the longest of them by place."""

    limits: Limits
    rows: int = 0
    _rectangles: dict[Place, tuple[int, int]] = field(default_factory=dict[Place, tuple[int, int]])
    _apart: int = 0

    @classmethod
    def of(cls, limits: Limits, lengths: Iterable[int]) -> Load:
        """Of a row of each length."""
        load = cls(limits)
        for length in lengths:
            load.add(length)
        return load

    def add(self, length: int, rows: int = 1) -> None:
        self.rows += rows
        if self.limits.are_apart:
            self._apart += rows * length
            return
        place = self.limits.place(length)
        old_rows, longest = self._rectangles.get(place, (0, 0))
        self._rectangles[place] = old_rows + rows, max(longest, length)

    @property
    def tokens(self) -> int:
        """What is charged; at most `limits.tokens` may be. A quarter as many of short sequences costs nothing."""
        if self.limits.are_apart:
            return self._apart
        sizes = {place: rows * longest for place, (rows, longest) in self._rectangles.items()}
        short = sum(size for (_, is_long), size in sizes.items() if not is_long)
        return sum(sizes.values()) - min(short, self.limits.tokens // _FOR_SHORT)

    @property
    def is_too_much(self) -> bool:
        return self.tokens > self.limits.tokens

    def fitting(self, length: int, most: int, may_fill: bool) -> int:
        """How many rows of a length there is room for, at most so many.

        Args:
            may_fill: whether nothing need be left for those that run to grow into.
        """
        if self.rows and not may_fill:
            limit = self.limits.tokens - self.limits.tokens // _TO_GROW
        else:
            limit = self.limits.tokens
        count = min(most, self.limits.rows - self.rows)
        while count > 0 and self._with(length, count).tokens > limit:
            count -= 1
        return max(0, count)

    def _with(self, length: int, rows: int) -> Load:
        more = Load(self.limits, self.rows, dict(self._rectangles), self._apart)
        more.add(length, rows)
        return more
