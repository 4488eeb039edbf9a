"""The exception: the batch for models that can't be run with rows of different lengths.

Such are models that make masks and positions of their own (Bloom), and those with layers that keep something else than
`layer_kinds` knows. The probe finds them at start-up, and the engine says so in its log.

Their caches are Transformers' own. So only sequences of equal length (mostly one prompt's samples) go through the model
together, one such group after another: slower than all at once, but with the same numbers, and no sample waits for
another's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.samplers.cache_usage import Limits, RowCost
from twinkle.server.samplers.transformers.lora import ResidentAdapter, RouteGroup
from twinkle.server.samplers.transformers.model_runner import ModelRunner, Prompt

# Prompts of one length are prefilled together up to this many tokens.
TOKENS_TOGETHER = 2048


class Group:
    """Sequences of one length: row i of the cache is the i-th.

    Attributes:
        prompts: one per row.
        length: tokens in the cache.
        is_broken: whether a failed pass has left the cache in an inconsistent state.
    """

    def __init__(
        self, runner: ModelRunner, prompts: list[Prompt], cache: DynamicCache, route: list[RouteGroup]
    ) -> None:
        self.prompts = prompts
        self.length = len(prompts[0].tokens)
        self.is_broken = False
        self._runner = runner
        self._cache = cache
        self._route = route
        self._latest: tuple[list[int], Tensor] | None = None  # of a step that other groups have not made

    def step(self, tokens: list[int]) -> Tensor:
        """Logits [rows, vocabulary] after one more token each; the same again until `end_step`."""
        if self._latest is not None and self._latest[0] == tokens:
            return self._latest[1]
        runner = self._runner
        positions = torch.full((1, 1), self.length, device=runner.device)
        runner.route.groups = self._route
        try:
            newest = to_device(torch.tensor(tokens), runner.device).unsqueeze(1)
            hidden = runner.body(newest, positions, None, self._cache)
            logits = runner.logits(hidden).squeeze(1)
        except Exception:
            self.is_broken = True  # half of its layers may have the token
            raise
        self._latest = tokens, logits
        return logits

    def row_cost(self) -> RowCost:
        growing = constant = 0
        for layer in cast("list[Any]", self._cache.layers):
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                growing += 0 if tensor is None else tensor[0, :, 0].numel() * tensor.element_size()
            for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
                constant += sum(t[0].numel() * t.element_size() for t in states.values() if t is not None)
        return RowCost(growing, constant=constant)

    def end_step(self) -> None:
        self._latest = None
        self.length += 1

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        self.prompts = [self.prompts[row] for row in rows]
        self.is_broken |= self._latest is not None  # it is a token ahead of the others
        if not rows or self.is_broken:
            return
        runner = self._runner
        try:
            kept = to_device(torch.tensor(rows), runner.device)
            self._cache.reorder_cache(cast("torch.LongTensor", kept))
            self._route = runner.routes.make([prompt.adapter for prompt in self.prompts])
        except Exception:  # some layers have fewer rows than others: recompute them
            self.is_broken = True


class EqualLengthBatch:
    """See `batches.Batch`. The rows are the groups', one group after another."""

    def __init__(self, runner: ModelRunner, limits: Limits) -> None:
        self.limits = limits
        self._runner = runner
        self._to_prefill: list[Prompt] = []
        self._groups: list[Group] = []

    @property
    def rows(self) -> int:
        return sum(len(group.prompts) for group in self._groups)

    @property
    def longest(self) -> int:
        return max((group.length for group in self._groups), default=0) + 1

    def add(self, prompts: Sequence[Prompt]) -> None:
        self._to_prefill += prompts

    def cancel_prefill(self, prompts: AbstractSet[Prompt]) -> None:
        self._to_prefill = [prompt for prompt in self._to_prefill if prompt not in prompts]

    def prefill(self) -> tuple[list[Prompt], Tensor]:
        if not self._to_prefill:
            return [], torch.empty(0)
        runner = self._runner
        prompts = self._next_prompts()
        of_rows = [prompt for prompt in prompts for _ in range(prompt.rows)]
        tokens = torch.stack([torch.from_numpy(prompt.tokens.copy()) for prompt in of_rows])
        cache = DynamicCache(config=runner.config.get_text_config())
        route = runner.routes.make([prompt.adapter for prompt in of_rows])
        runner.route.groups = route
        positions = torch.arange(tokens.shape[1], device=runner.device).unsqueeze(0)
        hidden = runner.body(tokens.to(runner.device), positions, None, cache)
        logits = runner.logits(hidden[:, -1:]).squeeze(1)
        first = 0
        for prompt in prompts:
            runner.score_prompt(prompt, hidden[first], 0)
            first += prompt.rows
        self._groups.append(Group(runner, of_rows, cache, route))
        self.cancel_prefill(set(prompts))
        return prompts, logits

    def _next_prompts(self) -> list[Prompt]:
        """The first prompt, and others of the same length."""
        length = len(self._to_prefill[0].tokens)
        chosen, rows = [self._to_prefill[0]], self._to_prefill[0].rows
        for prompt in self._to_prefill[1:]:
            if len(prompt.tokens) == length and (rows + prompt.rows) * length <= TOKENS_TOGETHER:
                chosen.append(prompt)
                rows += prompt.rows
        return chosen

    def stale_rows(self) -> list[int]:
        rows: list[int] = []
        first = 0
        regime = self.limits.rope_regime
        for group in self._groups:
            if group.is_broken or regime(group.length) != regime(group.length + 1):
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

    def drop(self, rows: Sequence[int], cacheable: bool) -> list[int]:
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
        self._runner.routes.keep(
            {prompt.adapter for group in self._groups for prompt in group.prompts}
            | {prompt.adapter for prompt in self._to_prefill}
        )
        return kept

    def row_cost(self) -> RowCost:
        """Of the first group's cache, with windows as if they grew without end."""
        return self._groups[0].row_cost()

    def forget_adapter(self, adapter: ResidentAdapter) -> None:
        """Nothing is kept for later prompts."""

    def free_memory(self) -> None:
        """Nothing is kept for later prompts."""
