"""The running batch, as far as the model is concerned: rows with keys and values, prompts in, logits out.

`SlotBatch` holds many sequences of different lengths. `lockstep.LockstepBatch` is for models whose layers are not all
full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from twinkle.server.samplers.cache_usage import Limits, Place
from twinkle.server.samplers.transformers.buckets import Row, Shelf
from twinkle.server.samplers.transformers.equal_length import LockstepBatch
from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.memory import is_out_of_memory
from twinkle.server.samplers.transformers.model_runner import Network, Prompt
from twinkle.server.samplers.transformers.prefix_cache import Owner, Prefixes, common_length

# Tokens of prompts in one forward pass; longer ones are read piece by piece.
PREFILL_TOKENS = 2048
# As many while others generate: between two of their tokens lies one such pass.
PREFILL_TOKENS_BETWEEN = 512
# Most sequences of a model that takes each group of them in a pass of its own.
LOCKSTEP_ROWS = 32


class Batch(Protocol):
    """Rows 0, 1, 2, ... of running sequences, and prompts on their way there."""

    limits: Limits

    @property
    def rows(self) -> int: ...

    @property
    def longest(self) -> int:
        """No row has more tokens after the next step."""
        ...

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

    def to_read_again(self) -> list[int]:
        """Rows that have to be dropped before the next step, and read again with their next token.

        What is kept of them isn't what the model would keep if it read them now: their next token takes them beyond a
        rope boundary, or a pass has failed half-way.
        """
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


# A shelf, and which rows of the batch stand there; None if they are all of them, in the same order.
Part: TypeAlias = tuple[Shelf, list[int] | None]


class SlotBatch:
    """Many sequences of different lengths, on shelves: most of the time on one."""

    def __init__(self, network: Network, limits: Limits, max_known_tokens: int) -> None:
        """
        Args:
            max_known_tokens: of sequences that have ended, for later prompts that begin like them.
        """
        self.limits = limits
        self._network = network
        self._shelves: dict[Place, Shelf] = {}
        self._rows: list[Row] = []
        self._parts: list[Part] | None = None  # made anew when the rows change
        self._longest = 0  # at least as long as the longest row
        self._known = Prefixes(max_known_tokens)

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        return self._longest + 1

    def add(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._shelf(self.limits.place(len(prompt.tokens))).reader.add([prompt])

    def forget(self, prompts: AbstractSet[Prompt]) -> None:
        for shelf in self._shelves.values():
            shelf.reader.remove(prompts)

    def read(self) -> tuple[list[Prompt], Tensor]:
        shelf = next((shelf for shelf in self._shelves.values() if shelf.reader.prompts), None)
        if shelf is None:
            return [], torch.empty(0)
        self._shelves[shelf.place] = self._shelves.pop(shelf.place)  # another one's turn next time
        network = self._network
        tokens = PREFILL_TOKENS_BETWEEN if self._rows else PREFILL_TOKENS
        read = shelf.reader.read(tokens, lambda prompt: self._find(prompt, shelf))
        if not read:
            return [], torch.empty(0)
        prompts = [one.prompt for one in read]
        network.route.groups = network.routes.make([prompt.adapter for prompt in prompts])
        logits = network.logits(torch.stack([one.hidden for one in read]).unsqueeze(1)).squeeze(1)
        self._rows += shelf.begin(read)
        shelf.reader.remove(set(prompts))
        self._rows_changed()
        counts = torch.tensor([prompt.rows for prompt in prompts], device=logits.device)
        return prompts, logits.repeat_interleave(counts, dim=0)

    def _find(self, prompt: Prompt, shelf: Shelf) -> tuple[int, list[Tensor]]:
        """What is known of a prompt's beginning: from sequences that have ended, or from prompts of running ones."""
        best, contents = self._known.find(_owner(prompt, shelf), prompt.tokens)
        found: tuple[Shelf, int] | None = None
        for other in self._shelves.values():
            if other.kind != shelf.kind:
                continue
            for i, row in enumerate(other.rows):
                if row.prompt.owner == prompt.owner:
                    common = common_length(prompt.tokens, row.prompt.tokens)
                    if common > best:
                        best, found = common, (other, i)
        return best, contents if found is None else found[0].cache.row(found[1], best)

    def to_read_again(self) -> list[int]:
        if not self.limits.boundaries:
            return []
        kind = self.limits.kind
        return [i for i, row in enumerate(self._rows) if kind(row.length) != kind(row.length + 1)]

    def step(self, tokens: Sequence[int]) -> Tensor:
        if self._longest >= self.limits.short:
            self._move_grown()
        if self._parts is None:
            self._parts = self._made_parts()
        if len(self._parts) == 1 and self._parts[0][1] is None:
            logits = self._parts[0][0].step(list(tokens))
        else:
            logits = self._step_parts(self._parts, tokens)
        for row, token in zip(self._rows, tokens, strict=True):
            row.generated.append(token)
        self._longest += 1
        return logits

    def _step_parts(self, parts: list[Part], tokens: Sequence[int]) -> Tensor:
        logits: list[Tensor] = []
        order: list[int] = []
        for shelf, numbers in parts:
            own = list(range(len(shelf.rows))) if numbers is None else numbers
            logits.append(shelf.step([tokens[row] for row in own]))
            order += own
        back = torch.tensor(order, device=self._network.device).argsort()
        return torch.cat(logits)[back]

    def _made_parts(self) -> list[Part]:
        shelves = [shelf for shelf in self._shelves.values() if shelf.rows]
        if len(shelves) == 1 and shelves[0].rows == self._rows:
            return [(shelves[0], None)]
        numbers = {row: i for i, row in enumerate(self._rows)}
        return [(shelf, [numbers[row] for row in shelf.rows]) for shelf in shelves]

    def _move_grown(self) -> None:
        """Rows that become long with the next token go to the shelf for those."""
        grown = [
            (shelf, row)
            for shelf in list(self._shelves.values())
            for row in shelf.rows
            if not shelf.is_long and row.length >= self.limits.short
        ]
        for shelf, row in grown:
            self._shelf((shelf.kind, True)).take_over(row, shelf)
            self._parts = None
        self._longest = max(row.length for row in self._rows)

    def drop(self, rows: Sequence[int], known: AbstractSet[int]) -> list[int]:
        shelf_of = {row: shelf for shelf in self._shelves.values() for row in shelf.rows}
        for number in known:
            row = self._rows[number]
            shelf = shelf_of[row]
            contents = shelf.cache.row(shelf.rows.index(row), row.length)
            try:
                self._known.add(_owner(row.prompt, shelf), row.tokens, contents)
            except Exception as error:  # it is only for speed, and a row that has ended has to go
                if not is_out_of_memory(error):
                    raise
                self._known.clear()
        order = list(range(self.rows))
        for number in sorted(rows, reverse=True):
            row = self._rows[number]
            shelf_of[row].take_out(row)
            order[number], self._rows[number] = order[-1], self._rows[-1]
            order.pop()
            self._rows.pop()
        for shelf in list(self._shelves.values()):
            shelf.trim()
            if not shelf.rows and not shelf.reader.prompts:
                del self._shelves[shelf.place]
        self._rows_changed()
        return order

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        self._known.forget(adapter)

    def free_memory(self) -> None:
        self._known.clear()

    def _shelf(self, place: Place) -> Shelf:
        if place not in self._shelves:
            self._shelves[place] = Shelf(self._network, self.limits, place)
        return self._shelves[place]

    def _rows_changed(self) -> None:
        self._parts = None
        self._longest = max((row.length for row in self._rows), default=0)
        used: set[ResidentAdapter | None] = {row.prompt.adapter for row in self._rows}
        for shelf in self._shelves.values():
            used |= shelf.reader.adapters
        self._network.routes.keep(used)


def make_batch(network: Network, limits: Limits, max_known_tokens: int, context: int) -> Batch:
    """The batch that fits the model's layers.

    Args:
        limits: of sequences in all; a batch may take fewer rows.
        context: most tokens of a sequence. A window that is as long is none.
    """
    text = network.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None)
    windowed = window is not None and window < context and getattr(text, "use_sliding_window", True)
    if kinds == {"full_attention"} and not (windowed and getattr(text, "layer_types", None) is None):
        return SlotBatch(network, limits, max_known_tokens)
    return lockstep_batch(network, limits)


def lockstep_batch(network: Network, limits: Limits) -> Batch:
    """The batch that takes whatever cache Transformers has for the model."""
    return LockstepBatch(network, replace(limits, rows=min(limits.rows, LOCKSTEP_ROWS), are_apart=True))


def _owner(prompt: Prompt, shelf: Shelf) -> Owner:
    """Keys and values of both sides of a rope boundary are not the same."""
    return (*prompt.owner, shelf.kind)
