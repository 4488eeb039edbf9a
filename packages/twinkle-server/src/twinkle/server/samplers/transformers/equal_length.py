"""The batch of models whose layers are not all full attention (sliding windows, linear attention).

Their caches are Transformers' own, which know no rows of different lengths. So sequences of the same length, the
samples of a prompt above all, go through the model together, and each such group after the other: slower than all at
once, but the same numbers, and nobody waits for another's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache

from twinkle.server.samplers.cache_usage import Limits
from twinkle.server.samplers.transformers.lora import ResidentAdapter, RouteGroup
from twinkle.server.samplers.transformers.model_runner import Network, Prompt

# Prompts of one length are read together up to so many tokens.
TOKENS_TOGETHER = 2048


class Group:
    """Sequences of one length: row i of the cache is the i-th.

    Attributes:
        prompts: each row's.
        length: tokens that have been read.
        is_broken: whether the cache is not what it should be, since a pass has failed.
    """

    def __init__(
        self, network: Network, prompts: list[Prompt], cache: DynamicCache, route: list[RouteGroup]
    ) -> None:
        self.prompts = prompts
        self.length = len(prompts[0].tokens)
        self.is_broken = False
        self._network = network
        self._cache = cache
        self._route = route
        self._latest: tuple[list[int], Tensor] | None = None  # of a step that isn't over for all groups

    def step(self, tokens: list[int]) -> Tensor:
        """Logits [rows, vocabulary] after one more token each; the same again until the step is over."""
        if self._latest is not None and self._latest[0] == tokens:
            return self._latest[1]
        network = self._network
        positions = torch.full((1, 1), self.length, device=network.device)
        network.route.groups = self._route
        try:
            newest = torch.tensor(tokens, device=network.device).unsqueeze(1)
            hidden = network.body(newest, positions, None, self._cache)
            logits = network.logits(hidden).squeeze(1)
        except Exception:
            self.is_broken = True  # half of its layers may have the token
            raise
        self._latest = tokens, logits
        return logits

    def end_step(self) -> None:
        self._latest = None
        self.length += 1

    def keep(self, rows: list[int]) -> None:
        """Only these are left, in this order."""
        self.prompts = [self.prompts[row] for row in rows]
        self.is_broken |= self._latest is not None  # it has read a token that others have not
        if not rows or self.is_broken:
            return
        network = self._network
        try:
            kept = torch.tensor(rows, device=network.device)
            self._cache.reorder_cache(cast("torch.LongTensor", kept))
            self._route = network.routes.make([prompt.adapter for prompt in self.prompts])
        except Exception:  # some layers have fewer rows than others; they are read again
            self.is_broken = True


class LockstepBatch:
    """See `batches.Batch`. The rows are those of the groups, one group after the other."""

    def __init__(self, network: Network, limits: Limits) -> None:
        self.limits = limits
        self._network = network
        self._to_read: list[Prompt] = []
        self._groups: list[Group] = []

    @property
    def rows(self) -> int:
        return sum(len(group.prompts) for group in self._groups)

    @property
    def longest(self) -> int:
        return max((group.length for group in self._groups), default=0) + 1

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._to_read += prompts

    def forget(self, prompts: AbstractSet[Prompt]) -> None:
        self._to_read = [prompt for prompt in self._to_read if prompt not in prompts]

    def read(self) -> tuple[list[Prompt], Tensor]:
        if not self._to_read:
            return [], torch.empty(0)
        network = self._network
        prompts = self._next_to_read()
        of_rows = [prompt for prompt in prompts for _ in range(prompt.rows)]
        tokens = torch.stack([torch.from_numpy(prompt.tokens.copy()) for prompt in of_rows])
        cache = DynamicCache(config=network.config.get_text_config())
        route = network.routes.make([prompt.adapter for prompt in of_rows])
        network.route.groups = route
        positions = torch.arange(tokens.shape[1], device=network.device).unsqueeze(0)
        hidden = network.body(tokens.to(network.device), positions, None, cache)
        logits = network.logits(hidden[:, -1:]).squeeze(1)
        first = 0
        for prompt in prompts:
            network.read_scores(prompt, hidden[first], 0)
            first += prompt.rows
        self._groups.append(Group(network, of_rows, cache, route))
        self.forget(set(prompts))
        return prompts, logits

    def _next_to_read(self) -> list[Prompt]:
        """The first that waits, and those of the same length."""
        length = len(self._to_read[0].tokens)
        chosen, rows = [self._to_read[0]], self._to_read[0].rows
        for prompt in self._to_read[1:]:
            if len(prompt.tokens) == length and (rows + prompt.rows) * length <= TOKENS_TOGETHER:
                chosen.append(prompt)
                rows += prompt.rows
        return chosen

    def to_read_again(self) -> list[int]:
        rows: list[int] = []
        first = 0
        for group in self._groups:
            kind = self.limits.kind
            if group.is_broken or kind(group.length) != kind(group.length + 1):
                rows += range(first, first + len(group.prompts))
            first += len(group.prompts)
        return rows

    def step(self, tokens: Sequence[int]) -> Tensor:
        logits: list[Tensor] = []
        first = 0
        for group in self._groups:
            end = first + len(group.prompts)
            logits.append(group.step(list(tokens[first:end])))
            first = end
        for group in self._groups:
            group.end_step()
        return torch.cat(logits)

    def drop(self, rows: Sequence[int], known: AbstractSet[int]) -> list[int]:
        dropped = set(rows)
        kept = [row for row in range(self.rows) if row not in dropped]
        first = 0
        for group in self._groups:
            end = first + len(group.prompts)
            own = [row - first for row in range(first, end) if row not in dropped]
            if len(own) < end - first:
                group.keep(own)
            first = end
        self._groups = [group for group in self._groups if group.prompts]
        self._network.routes.keep(
            {prompt.adapter for group in self._groups for prompt in group.prompts}
            | {prompt.adapter for prompt in self._to_read}
        )
        return kept

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        """Nothing is kept anyway."""

    def free_memory(self) -> None:
        """Nothing is kept anyway."""
