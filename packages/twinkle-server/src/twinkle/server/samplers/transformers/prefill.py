"""Chunked prefill: prompts go through the model piece by piece, so that decoding need not wait for a long one.

Until it is complete, a prompt has a row in the queue's own cache. If it begins like another of the same tenant and
adapter (its prefix donor), what layers keep of that beginning is copied; if the donor is still being prefilled, the
prompt waits for that part of it. (Where layers keep states or windows, the donor's chunk ends there.)

Prompts of different lengths are padded, as long as the layers can leave padding out of their states; see
`recurrence.Sharing` for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from twinkle.server.samplers.transformers.cache import RowContents, SlotCache
from twinkle.server.samplers.transformers.lora import ResidentAdapter, RouteGroup
from twinkle.server.samplers.transformers.memory import CacheMemory
from twinkle.server.samplers.transformers.model_runner import PADDING, ModelRunner, Prompt
from twinkle.server.samplers.transformers.prefix_cache import MIN_PREFIX_TOKENS, common_prefix_length
from twinkle.server.samplers.transformers.recurrence import Sharing

# Finds what is cached elsewhere of a beginning of a prompt's first so many tokens: see `PrefixCache.lookup`.
Lookup: TypeAlias = Callable[[Prompt, int], RowContents | None]

# Most tokens of a prompt in one pass.
LONGEST_PASS = 2048
# Where layers keep states, those of a prompt's beginning are offered to later prompts as often as this, in tokens.
BORDER_TOKENS = 256


@dataclass(eq=False)
class Prefill:
    """
    Attributes:
        position: tokens that are in the cache.
        border: the position at which its states were last offered.
        donor: an earlier prompt with the same beginning, whose first `common` tokens are waited for.
    """

    prompt: Prompt
    position: int = 0
    border: int = 0
    donor: Prefill | None = None
    common: int = 0

    @property
    def left(self) -> int:
        return len(self.prompt.tokens) - self.position

    @property
    def reusable(self) -> int:
        """How many tokens need not be computed. Not the last one, nor those that something is requested about: their
        hidden states are needed.
        """
        scores = self.prompt.scores
        last = len(self.prompt.tokens) - 1
        return last if scores is None else min(last, scores.first_row)


@dataclass(eq=False)
class Prefilled:
    """A complete prompt.

    Attributes:
        hidden: of its last token [hidden].
        contents: see `SlotCache.row`; valid until the queue is used again.
    """

    prompt: Prompt
    hidden: Tensor
    contents: RowContents


class PrefillQueue:
    """Row i of its cache is the i-th active prompt's; others wait for their donors."""

    def __init__(self, runner: ModelRunner, memory: CacheMemory, boundary: int = 0) -> None:
        """
        Args:
            memory: of its cache.
            boundary: prompts are longer than this, which the model must see from the first chunk on (see
                `rope_boundaries`); 0: no boundary.
        """
        self._runner = runner
        self._boundary = boundary
        # One more for the column of padding that makes the model see a long sequence.
        self._cache = SlotCache(runner.kinds, memory, LONGEST_PASS + 1, padding_position=boundary)
        self._active: list[Prefill] = []
        self._waiting: list[Prefill] = []
        self._route: list[RouteGroup] | None = None  # of the active ones; None: they have changed

    @property
    def prompts(self) -> list[Prompt]:
        return [prefill.prompt for prefill in (*self._active, *self._waiting)]

    @property
    def adapters(self) -> AbstractSet[ResidentAdapter | None]:
        return {prompt.adapter for prompt in self.prompts}

    def add(self, prompt: Prompt) -> None:
        prefill = Prefill(prompt)
        self._find_donor(prefill, [*self._active, *self._waiting])
        self._waiting.append(prefill)

    def remove(self, prompts: AbstractSet[Prompt]) -> None:
        """Remove complete or cancelled prompts."""
        for row in reversed(range(len(self._active))):
            if self._active[row].prompt in prompts:
                self._take_out(row)
        self._waiting = [prefill for prefill in self._waiting if prefill.prompt not in prompts]
        for i, prefill in enumerate(self._waiting):
            if prefill.donor is not None and prefill.donor.prompt in prompts:
                self._find_donor(prefill, [*self._active, *self._waiting[:i]])
        if not self._active:
            self._cache.clear()

    def prefill(self, tokens: int, lookup: Lookup) -> list[Prefilled]:
        """One pass with an equally long chunk of every prompt that need not wait, of `tokens` tokens together if
        possible.

        Returns:
            The complete ones; the caller must remove them.
        """
        self._activate(lookup)
        count = len(self._active)
        n = self._chunk(max(1, tokens // count))
        starts = [prefill.position for prefill in self._active]
        self._cache.reserve(count, max(starts) + n + 1)
        hidden = self._forward(n, starts)[:, :n]
        for i, prefill in enumerate(self._active):
            self._runner.score_prompt(prefill.prompt, hidden[i], starts[i])
        complete: list[Prefilled] = []
        for row, prefill in enumerate(self._active):
            left, prefill.position = prefill.left, min(prefill.position + n, len(prefill.prompt.tokens))
            if left <= n:
                contents = self._cache.row(row, prefill.position)
                complete.append(Prefilled(prefill.prompt, hidden[row, left - 1], contents))
        return complete

    def at_borders(self) -> list[tuple[Prompt, RowContents]]:
        """Incomplete prompts, with what layers keep of their beginnings and won't have any more later."""
        found: list[tuple[Prompt, RowContents]] = []
        for row, prefill in enumerate(self._active):
            is_awaited = any(
                other.donor is prefill and other.common == prefill.position for other in self._waiting
            )
            if prefill.left and (is_awaited or prefill.position >= prefill.border + BORDER_TOKENS):
                contents = self._cache.row(row, prefill.position)
                if not contents.usable(prefill.position - 1):
                    found.append((prefill.prompt, contents))
                    prefill.border = prefill.position
        return found

    def _chunk(self, most: int) -> int:
        """How many tokens of each active prompt the next pass has."""
        left = [prefill.left for prefill in self._active]
        match self._runner.sharing:
            case Sharing.WHOLE:
                return left[0]
            case Sharing.EVEN:
                n = min(most, min(left), LONGEST_PASS)
            case Sharing.PADDED:
                n = min(most, max(left), LONGEST_PASS)
        if not self._runner.kinds.can_go_back:
            for waiting in self._waiting:
                if waiting.donor in self._active and waiting.common > waiting.donor.position:
                    n = min(n, waiting.common - waiting.donor.position)
        return n

    def _activate(self, lookup: Lookup) -> None:
        """Give rows to prompts that need not wait any more, with the cached part of their beginnings."""
        still_waiting: list[Prefill] = []
        for prefill in self._waiting:
            donor = prefill.donor
            if donor is not None and donor.position < prefill.common:
                still_waiting.append(prefill)
                continue
            if self._runner.sharing is Sharing.WHOLE:
                if self._active and self._active[0].left != prefill.left:
                    still_waiting.append(prefill)
                    continue
                contents = None
            else:
                contents = lookup(prefill.prompt, prefill.reusable)
                from_donor = self._from_donor(prefill)
                if from_donor is not None and (contents is None or from_donor.length > contents.length):
                    contents = from_donor
            row = len(self._active)
            self._cache.reserve(row + 1, prefill.common if contents is None else contents.length)
            if contents is None or contents.length < MIN_PREFIX_TOKENS:
                prefill.position = 0
                self._cache.clear_states(slice(row, row + 1))
            else:
                prefill.position = prefill.border = contents.length
                self._cache.write_rows(slice(row, row + 1), contents)
            self._active.append(prefill)
            self._route = None
        self._waiting = still_waiting

    def _from_donor(self, prefill: Prefill) -> RowContents | None:
        """What layers keep of the beginning that a prompt shares with its donor, if that has it now."""
        donor = prefill.donor
        if donor not in self._active:
            return None
        contents = self._cache.row(self._active.index(donor), donor.position)
        return contents.cut(prefill.common) if contents.usable(prefill.common) == prefill.common else None

    def _find_donor(self, prefill: Prefill, earlier: Sequence[Prefill]) -> None:
        prefill.donor, prefill.common = None, 0
        if self._runner.sharing is Sharing.WHOLE:
            return
        for other in earlier:
            if other.prompt.owner != prefill.prompt.owner:
                continue
            common = common_prefix_length(prefill.prompt.tokens, other.prompt.tokens)
            common = min(common, prefill.reusable)
            if common >= MIN_PREFIX_TOKENS and common > prefill.common:
                prefill.donor, prefill.common = other, common

    def _take_out(self, row: int) -> None:
        """Remove a row; the last one moves into its place."""
        last = len(self._active) - 1
        if row != last:
            moved = self._active[row] = self._active[last]
            self._cache.write_rows(slice(row, row + 1), self._cache.row(last, moved.position))
        self._active.pop()
        self._route = None

    def _forward(self, n: int, starts: list[int]) -> Tensor:
        """The next n tokens of every active prompt, padded if it has fewer left."""
        runner = self._runner
        # Before the boundary one more column of padding goes beyond it, so that the model sees a long sequence.
        width = n if max(starts) + n > self._boundary or not self._boundary else n + 1
        tokens = torch.full((len(starts), width), PADDING)
        for row, prefill in zip(tokens, self._active, strict=True):
            own = prefill.prompt.tokens[prefill.position : prefill.position + n]
            row[: len(own)] = torch.from_numpy(own.copy())
        if self._route is None:
            self._route = runner.routes.make([prefill.prompt.adapter for prefill in self._active])
        runner.route.groups = self._route
        return runner.forward(self._cache, slice(0, len(starts)), tokens, starts)
