"""The running batch as the model sees it: prompts in, logits out, with rows of what layers keep in between.

`SlotBatch` holds sequences of different lengths, for all layers that `layer_kinds` knows.
`equal_length.EqualLengthBatch` is for the models that take only caches of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from twinkle.protocol.types import Int64Array
from twinkle.server.backends.hf.device_memory import is_out_of_memory
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.samplers.cache_usage import BucketKey, Limits, RowCost
from twinkle.server.samplers.transformers.buckets import Bucket, Row
from twinkle.server.samplers.transformers.cache import RowContents
from twinkle.server.samplers.transformers.equal_length import EqualLengthBatch
from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.memory import CacheMemory
from twinkle.server.samplers.transformers.model_runner import ModelRunner, Prompt
from twinkle.server.samplers.transformers.prefix_cache import Owner, PrefixCache, common_prefix_length
from twinkle.server.samplers.transformers.recurrence import Sharing

# Prompt tokens in one forward pass; longer prompts take several.
PREFILL_TOKENS = 2048
# The same while sequences are decoding: such a pass delays each one's next token.
DECODING_PREFILL_TOKENS = 512
# Most sequences for a model that needs a separate pass for each group of them.
EQUAL_LENGTH_ROWS = 32


class Batch(Protocol):
    """Rows 0, 1, 2, ... of running sequences, and the prompts being prefilled."""

    limits: Limits

    @property
    def rows(self) -> int: ...

    @property
    def longest(self) -> int:
        """An upper bound on any row's tokens after the next step."""
        ...

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Queue prompts to be prefilled."""
        ...

    def prefill(self) -> tuple[list[Prompt], Tensor]:
        """Prefill one chunk. If it raises, the prompts must be cancelled; nothing else has changed.

        Returns:
            The prompts that are complete, and the logits [new rows, vocabulary] of their rows' next tokens. These rows
            follow the existing ones, prompt by prompt.
        """
        ...

    def cancel_prefill(self, prompts: AbstractSet[Prompt]) -> None: ...

    def stale_rows(self) -> list[int]:
        """Rows to be dropped before the next step, and prefilled again with their newest tokens.

        What layers keep of them is not what the model would compute now: the next token takes them beyond a rope
        boundary, or a pass has failed halfway.
        """
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Decode: append a token to each row; returns logits [rows, vocabulary]. All or nothing."""
        ...

    def drop(self, rows: Sequence[int], cacheable: bool) -> list[int]:
        """Remove rows.

        Args:
            cacheable: whether what layers keep of them may be kept for later prompts.

        Returns:
            For each remaining row, its old number.
        """
        ...

    def row_cost(self) -> RowCost:
        """What a sequence takes in this batch, which must have some."""
        ...

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        """The adapter was removed: keep nothing for later prompts that would use it."""
        ...

    def free_memory(self) -> None:
        """Release what is only kept for later prompts."""
        ...


# A bucket, and the rows of the batch that are in it; None: all of them, in the same order.
Part: TypeAlias = tuple[Bucket, list[int] | None]


class SlotBatch:
    """Sequences of different lengths, in buckets; usually in one."""

    def __init__(self, runner: ModelRunner, limits: Limits) -> None:
        """
        Raises:
            ValueError: if the model's layers can't be run with rows of different lengths.
        """
        if runner.kinds.unknown:
            raise ValueError(runner.kinds.unknown)
        if limits.boundaries and runner.sharing is not Sharing.PADDED:
            raise ValueError(
                "its rope changes with the length, and its recurrent layers can't leave padding out"
            )
        self.limits = limits
        self._runner = runner
        self._buckets: dict[BucketKey, Bucket] = {}
        self._rows: list[Row] = []
        self._parts: list[Part] | None = None  # None: the rows have changed
        self._longest = 0  # at least the longest row's length
        self._prefixes = PrefixCache(limits.prefix_tokens, limits.cost.tokens(0))
        self._memory = CacheMemory(limits.bytes)

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        return self._longest + 1

    def add(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._bucket(self.limits.bucket(len(prompt.tokens))).prefills.add(prompt)

    def cancel_prefill(self, prompts: AbstractSet[Prompt]) -> None:
        for bucket in self._buckets.values():
            bucket.prefills.remove(prompts)

    def prefill(self) -> tuple[list[Prompt], Tensor]:
        bucket = next((bucket for bucket in self._buckets.values() if bucket.prefills.prompts), None)
        if bucket is None:
            return [], torch.empty(0)
        self._buckets[bucket.key] = self._buckets.pop(bucket.key)  # next time it is another one's turn
        runner = self._runner
        tokens = DECODING_PREFILL_TOKENS if self._rows else PREFILL_TOKENS
        complete = bucket.prefills.prefill(tokens, lambda prompt, most: self._lookup(prompt, most, bucket))
        for prompt, contents in bucket.prefills.at_borders():
            self._keep(_owner(prompt, bucket), prompt.tokens[: contents.length], contents)
        if not complete:
            return [], torch.empty(0)
        prompts = [one.prompt for one in complete]
        runner.route.groups = runner.routes.make([prompt.adapter for prompt in prompts])
        logits = runner.logits(torch.stack([one.hidden for one in complete]).unsqueeze(1)).squeeze(1)
        self._rows += bucket.begin(complete)
        bucket.prefills.remove(set(prompts))
        self._rows_changed()
        counts = to_device(torch.tensor([prompt.rows for prompt in prompts]), logits.device)
        rows = sum(prompt.rows for prompt in prompts)  # else a GPU would be asked
        return prompts, logits.repeat_interleave(counts, dim=0, output_size=rows)

    def _lookup(self, prompt: Prompt, most: int, bucket: Bucket) -> RowContents | None:
        """What is cached of a prompt's first `most` tokens, of ended sequences or of running ones' prompts."""
        tokens = prompt.tokens[:most]
        best = self._prefixes.lookup(_owner(prompt, bucket), tokens)
        for other in self._buckets.values():
            if other.rope_regime != bucket.rope_regime:
                continue
            for i, row in enumerate(other.rows):
                if row.prompt.owner != prompt.owner or row.is_broken:
                    continue
                common = common_prefix_length(tokens, row.prompt.tokens)
                if common > (0 if best is None else best.length):
                    contents = other.cache.row(i, row.length)
                    if contents.usable(common) == common:
                        best = contents.cut(common)
        return best

    def _keep(self, owner: Owner, tokens: Int64Array, contents: RowContents) -> None:
        """Keep a copy for later prompts, if there is memory."""
        try:
            self._prefixes.add(owner, tokens, contents)
        except Exception as error:  # the cache is only an optimization
            if not is_out_of_memory(error):
                raise
            self._prefixes.clear()

    def stale_rows(self) -> list[int]:
        regime = self.limits.rope_regime
        return [
            i
            for i, row in enumerate(self._rows)
            if row.is_broken or (self.limits.boundaries and regime(row.length) != regime(row.length + 1))
        ]

    def step(self, tokens: Sequence[int]) -> Tensor:
        if self._longest >= self.limits.short:
            self._move_grown()
        if self._parts is None:
            self._parts = self._made_parts()
        try:
            if len(self._parts) == 1 and self._parts[0][1] is None:
                logits = self._parts[0][0].step(list(tokens))
            else:
                logits = self._step_parts(self._parts, tokens)
        except Exception:
            # Keys and values are written again in the next step, but some layers' states have taken the tokens in.
            for row in self._rows:
                row.is_broken = bool(self._runner.kinds.states)
            raise
        for row, token in zip(self._rows, tokens, strict=True):
            row.generated.append(token)
        self._longest += 1
        return logits

    def _step_parts(self, parts: list[Part], tokens: Sequence[int]) -> Tensor:
        logits: list[Tensor] = []
        order: list[int] = []
        for bucket, numbers in parts:
            own = list(range(len(bucket.rows))) if numbers is None else numbers
            logits.append(bucket.step([tokens[row] for row in own]))
            order += own
        back = to_device(torch.tensor(order), self._runner.device).argsort()
        return torch.cat(logits)[back]

    def _made_parts(self) -> list[Part]:
        buckets = [bucket for bucket in self._buckets.values() if bucket.rows]
        if len(buckets) == 1 and buckets[0].rows == self._rows:
            return [(buckets[0], None)]
        numbers = {row: i for i, row in enumerate(self._rows)}
        return [(bucket, [numbers[row] for row in bucket.rows]) for bucket in buckets]

    def _move_grown(self) -> None:
        """Move rows that become long with the next token to a bucket of long ones."""
        grown = [
            (bucket, row)
            for bucket in list(self._buckets.values())
            for row in bucket.rows
            if not bucket.is_long and row.length >= self.limits.short
        ]
        for bucket, row in grown:
            self._bucket((bucket.rope_regime, True)).move_in(row, bucket)
            self._parts = None
        self._longest = max(row.length for row in self._rows)

    def drop(self, rows: Sequence[int], cacheable: bool) -> list[int]:
        bucket_of = {row: bucket for bucket in self._buckets.values() for row in bucket.rows}
        for number in rows if cacheable else ():
            row = self._rows[number]
            bucket = bucket_of[row]
            if not row.is_broken:
                contents = bucket.cache.row(bucket.rows.index(row), row.length)
                self._keep(_owner(row.prompt, bucket), row.tokens, contents)
        order = list(range(self.rows))
        for number in sorted(rows, reverse=True):
            row = self._rows[number]
            bucket_of[row].take_out(row)
            order[number], self._rows[number] = order[-1], self._rows[-1]
            order.pop()
            self._rows.pop()
        for bucket in list(self._buckets.values()):
            bucket.trim()
            if not bucket.rows and not bucket.prefills.prompts:
                del self._buckets[bucket.key]
        self._rows_changed()
        return order

    def row_cost(self) -> RowCost:
        return next(bucket for bucket in self._buckets.values() if bucket.rows).cache.row_cost()

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        self._prefixes.forget(adapter)

    def free_memory(self) -> None:
        self._prefixes.clear()

    def _bucket(self, key: BucketKey) -> Bucket:
        if key not in self._buckets:
            self._buckets[key] = Bucket(self._runner, self.limits, key, self._memory)
        return self._buckets[key]

    def _rows_changed(self) -> None:
        self._parts = None
        self._longest = max((row.length for row in self._rows), default=0)
        used: set[ResidentAdapter | None] = {row.prompt.adapter for row in self._rows}
        for bucket in self._buckets.values():
            used |= bucket.prefills.adapters
        self._runner.routes.keep(used)


def equal_length_batch(runner: ModelRunner, limits: Limits) -> Batch:
    """The batch that uses Transformers' own cache for the model."""
    return EqualLengthBatch(
        runner, replace(limits, rows=min(limits.rows, EQUAL_LENGTH_ROWS), per_sequence=True)
    )


def _owner(prompt: Prompt, bucket: Bucket) -> Owner:
    """Keys and values differ between the two sides of a rope boundary."""
    return (*prompt.owner, bucket.rope_regime)
