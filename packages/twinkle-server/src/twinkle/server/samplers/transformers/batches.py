"""The running batch, as far as the model is concerned: rows with keys and values, prompts in, logits out.

`SlotBatch` holds many sequences of different lengths in one `SlotCache`. `SingleBatch` holds the samples of one prompt
in Transformers' own cache, for models whose layers are not all full attention (sliding windows, linear attention):
slower, since requests follow each other, but the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from twinkle.protocol.types import Int64Array
from twinkle.server.backends.transformers.base_model import decoder, finish_logits
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RouteMaker
from twinkle.server.samplers.transformers.prompt_scores import PromptScores

# Tokens of prompts in one forward pass; longer ones are read piece by piece.
PREFILL_TOKENS = 2048
# Logits of prompt tokens that are held at once, when anything is asked about these: tokens times the vocabulary.
PROMPT_LOGITS = 2**24


@dataclass(eq=False)
class Prompt:
    """A prompt to read.

    Attributes:
        rows: how many samples begin with it.
        scores: takes what is asked about its tokens; None if nothing is.
    """

    tokens: Int64Array
    adapter: ResidentAdapter | None
    rows: int
    scores: PromptScores | None = None


class Batch(Protocol):
    """Rows 0, 1, 2, ... of running sequences."""

    max_rows: int

    @property
    def rows(self) -> int: ...

    def admit(self, prompts: Sequence[Prompt]) -> Tensor:
        """Read prompts and give each its rows, behind those that there are. If it raises, nothing has changed.

        Returns:
            Logits [new rows, vocabulary] for the token after each prompt.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token, int64 [rows], to each row; returns logits [rows, vocabulary]. All or nothing."""
        ...

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Take rows out.

        Returns:
            For each row that there is then, which one it was before.
        """
        ...


class Network:
    """A module tree with routed layers, cut into body and head."""

    def __init__(self, model: PreTrainedModel, route: Route) -> None:
        self.route = route
        self.routes = RouteMaker(model.device)
        self.device = model.device
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.config = model.config
        self._body = decoder(model)
        self._output = cast("nn.Module", model.get_output_embeddings())

    def body(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: object) -> Tensor:
        """Hidden states [rows, n, hidden]."""
        output = cast("Any", self._body)(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        return cast("Tensor", output.last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, n, hidden] to [rows, n, vocabulary]; the route must be about these rows."""
        return finish_logits(self._output(hidden), self.config)

    def read_scores(self, prompts: Sequence[Prompt], hidden: Tensor, start: int) -> None:
        """Answer what the prompts ask about the tokens that follow positions [start, start + n).

        Each prompt's logits are worked out by themselves: nothing is spent on those that ask nothing.

        Args:
            hidden: [prompts, n, hidden]; positions beyond a prompt's end are passed over.
        """
        whole_route = self.route.groups
        try:
            for prompt, states in zip(prompts, hidden, strict=True):
                if prompt.scores is not None:
                    self._read_scores_of_one(prompt, prompt.scores, states, start)
        finally:
            self.route.groups = whole_route

    def _read_scores_of_one(self, prompt: Prompt, scores: PromptScores, states: Tensor, start: int) -> None:
        first, end = max(scores.first_row, start), min(scores.rows, start + len(states))
        if first >= end:
            return
        self.route.groups = self.routes.make_one(prompt.adapter)
        step = max(1, PROMPT_LOGITS // int(self.config.get_text_config().vocab_size))
        for row in range(first, end, step):
            piece = states[row - start : min(row + step, end) - start]
            scores.read(row, self.logits(piece.unsqueeze(0)).squeeze(0))


class SlotBatch:
    """Many sequences in one cache."""

    def __init__(self, network: Network, max_rows: int) -> None:
        self.max_rows = max_rows
        self._network = network
        self._cache = SlotCache(network.num_layers)
        self._lengths: list[int] = []
        self._adapters: list[ResidentAdapter | None] = []

    @property
    def rows(self) -> int:
        return len(self._lengths)

    def admit(self, prompts: Sequence[Prompt]) -> Tensor:
        before = self.rows
        total = before + sum(prompt.rows for prompt in prompts)
        self._cache.reserve(total, max(self._longest(), *(len(prompt.tokens) + 1 for prompt in prompts)))
        network = self._network
        network.route.groups = network.routes.make([prompt.adapter for prompt in prompts])
        try:
            logits = network.logits(self._prefill(prompts, before).unsqueeze(1)).squeeze(1)
        except BaseException:
            self._set_route()
            raise
        return self._expand(prompts, before, logits)

    def _prefill(self, prompts: Sequence[Prompt], first_row: int) -> Tensor:
        """Read prompts into rows from `first_row` on; returns each one's last hidden state [prompts, hidden]."""
        network = self._network
        longest = max(len(prompt.tokens) for prompt in prompts)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt.tokens)] = torch.from_numpy(prompt.tokens.copy())
        tokens = tokens.to(network.device)
        rows = slice(first_row, first_row + len(prompts))
        last: list[Tensor | None] = [None] * len(prompts)
        step = max(1, PREFILL_TOKENS // len(prompts))
        for start in range(0, longest, step):
            piece = tokens[:, start : start + step]
            hidden = self._forward(piece, torch.full((len(prompts),), start, device=network.device), rows)
            network.read_scores(prompts, hidden, start)
            for i, prompt in enumerate(prompts):
                if start <= len(prompt.tokens) - 1 < start + piece.shape[1]:
                    last[i] = hidden[i, len(prompt.tokens) - 1 - start]
        return torch.stack([state for state in last if state is not None])

    def _expand(self, prompts: Sequence[Prompt], first_row: int, logits: Tensor) -> Tensor:
        """Give every sample its row: the first of each prompt has been read, the others are copies of it."""
        more: list[int] = []
        next_row = first_row + len(prompts)
        for i, prompt in enumerate(prompts):
            copies = list(range(next_row, next_row + prompt.rows - 1))
            if copies:
                self._cache.copy_row(first_row + i, copies, len(prompt.tokens))
                more += [i] * len(copies)
                next_row += len(copies)
        for i in [*range(len(prompts)), *more]:
            self._lengths.append(len(prompts[i].tokens))
            self._adapters.append(prompts[i].adapter)
        self._set_route()
        return torch.cat([logits, logits[more]]) if more else logits

    def step(self, tokens: Tensor) -> Tensor:
        self._cache.reserve(self.rows, self._longest() + 1)
        lengths = torch.tensor(self._lengths, device=self._network.device)
        hidden = self._forward(tokens.unsqueeze(1), lengths, slice(0, self.rows))
        logits = self._network.logits(hidden).squeeze(1)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def drop(self, rows: Sequence[int]) -> list[int]:
        order = list(range(self.rows))
        for row in sorted(rows, reverse=True):
            last = len(order) - 1
            if row != last:
                self._cache.copy_row(last, [row], self._lengths[last])
            for values in (order, self._lengths, self._adapters):
                moved = values.pop()
                if row != last:
                    values[row] = moved  # pyright: ignore[reportArgumentType, reportCallIssue]
        if not order:
            self._cache.clear()
        self._set_route()
        return order

    def _forward(self, tokens: Tensor, starts: Tensor, rows: slice) -> Tensor:
        """Hidden states of tokens [rows, n] that stand at positions starts [rows] and on."""
        n = tokens.shape[1]
        positions = starts.unsqueeze(1) + torch.arange(n, device=tokens.device)
        end = int(starts.max()) + n
        self._cache.begin(rows, positions, end)
        mask = torch.arange(end, device=tokens.device) <= positions.unsqueeze(-1)
        return self._network.body(tokens, positions, mask.unsqueeze(1), self._cache)

    def _set_route(self) -> None:
        self._network.route.groups = self._network.routes.make(self._adapters)

    def _longest(self) -> int:
        return max(self._lengths, default=0)


class SingleBatch:
    """The samples of one prompt, in Transformers' own cache. Rows that ended are computed on until all have."""

    max_rows = 16

    def __init__(self, network: Network) -> None:
        self._network = network
        self._cache: DynamicCache | None = None
        self._length = 0
        self._live: list[int] = []
        self._width = 0

    @property
    def rows(self) -> int:
        return len(self._live)

    def admit(self, prompts: Sequence[Prompt]) -> Tensor:
        [prompt] = prompts
        network = self._network
        tokens = torch.from_numpy(prompt.tokens.copy()).to(network.device).expand(prompt.rows, -1)
        cache = DynamicCache(config=network.config.get_text_config())
        network.route.groups = network.routes.make([prompt.adapter] * prompt.rows)
        positions = torch.arange(tokens.shape[1], device=network.device).unsqueeze(0)
        hidden = network.body(tokens, positions, None, cache)
        logits = network.logits(hidden[:, -1:]).squeeze(1)
        network.read_scores([prompt], hidden[:1], 0)
        self._cache, self._length, self._width = cache, tokens.shape[1], prompt.rows
        self._live = list(range(prompt.rows))
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        # A cache that a failed step has half written can't be used again, so this batch's steps are not retried.
        all_tokens = torch.zeros(self._width, 1, dtype=torch.int64, device=tokens.device)
        all_tokens[self._live, 0] = tokens
        positions = torch.full((1, 1), self._length, device=tokens.device)
        hidden = self._network.body(all_tokens, positions, None, self._cache)
        self._length += 1
        return self._network.logits(hidden).squeeze(1)[self._live]

    def drop(self, rows: Sequence[int]) -> list[int]:
        kept = [row for row in range(self.rows) if row not in set(rows)]
        self._live = [self._live[row] for row in kept]
        if not self._live:
            self._cache = None
        return kept


def make_batch(network: Network, max_rows: int) -> Batch:
    """The batch that fits the model's layers."""
    text = network.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if kinds == {"full_attention"} and not (windowed and getattr(text, "layer_types", None) is None):
        return SlotBatch(network, max_rows)
    return SingleBatch(network)
