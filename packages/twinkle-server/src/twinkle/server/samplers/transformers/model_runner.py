"""The model, split into body and head, with routed layers; and its prompts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinkle.protocol.types import Int64Array
from twinkle.server.backends.hf.base_model import decoder, finish_logits
from twinkle.server.backends.hf.threads import Threads
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.layer_kinds import LayerKinds, Span
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RouteMaker
from twinkle.server.samplers.transformers.prompt_scores import PromptScores
from twinkle.server.samplers.transformers.recurrence import Padding, prompts_share

# Most logits of prompt tokens held at once, if they are needed: tokens times the vocabulary.
PROMPT_LOGITS = 2**24

# Recurrent layers take only masks of padding, which is kept from their states otherwise (`recurrence`).
_NO_MASKS = {"linear_attention": None, "conv": None}

# Pads rows that have fewer tokens than others.
PADDING = -1


@dataclass(eq=False)
class Prompt:
    """A prompt to prefill.

    Attributes:
        rows: how many samples begin with it.
        scores: collects what is requested about its tokens; None if nothing is.
    """

    tenant: str
    tokens: Int64Array
    adapter: ResidentAdapter | None
    rows: int
    scores: PromptScores | None = None

    @property
    def owner(self) -> tuple[str, ResidentAdapter | None]:
        return self.tenant, self.adapter


class ModelRunner:
    """Forward passes of a module tree with routed layers, split into body and head.

    Attributes:
        kinds: what the layers keep.
        sharing: how prompts of different lengths go through the layers together.
    """

    def __init__(self, model: PreTrainedModel, route: Route, kinds: LayerKinds) -> None:
        """
        Args:
            model: layers of its tree are replaced, so that padding leaves recurrent layers' states as they are.
        """
        self.kinds = kinds
        self.route = route
        self.routes = RouteMaker(model.device)
        self.device = model.device
        self.dtype = model.dtype
        self.config = model.config
        self._body = decoder(model)
        self._padding = Padding()
        self.sharing = prompts_share(self._body, len(kinds.states), self._padding)
        # Without the decorators, which only fill in and convert arguments, and take longer than a layer of a small
        # model.
        self._run_body = inspect.unwrap(type(self._body).forward)
        # Later versions of Transformers have another name for it.
        names = inspect.signature(self._run_body).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._output = cast("nn.Module", model.get_output_embeddings())
        self._threads = Threads(model)

    def body(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor | None] | None, cache: object
    ) -> Tensor:
        """Hidden states [rows, n, hidden]."""
        self._threads.fit(tokens.numel())
        output = self._run_body(
            self._body,
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: cache},
        )
        return cast("Tensor", output.last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, n, hidden] to [rows, n, vocabulary]; the route must be for these rows."""
        return finish_logits(self._output(hidden), self.config)

    def forward(self, cache: SlotCache, rows: slice, tokens: Tensor, starts: list[int]) -> Tensor:
        """Run tokens through the model, and write their keys and values into rows of a cache.

        Padding is computed too, but at a position that the cache chooses: some models choose their rope frequencies by
        the largest position of a call, which must not depend on what else is in it.

        Args:
            tokens: int64 [rows, n], on the host, padded with `PADDING` at the end.
            starts: the position of each row's first token.

        Returns:
            Hidden states [rows, n, hidden].
        """
        n = tokens.shape[1]
        first = to_device(torch.tensor(starts), self.device).unsqueeze(1)
        end = max(starts) + n
        if n == 1:
            cache.begin(rows, first, end)
            return self.body(to_device(tokens, self.device), first, self._masks(cache, first, end), cache)
        # Where layers keep states; counted before the tokens are on a GPU, which would have to be waited for.
        counts = (tokens >= 0).sum(1).tolist() if cache.kinds.states else []
        tokens = to_device(tokens, self.device)
        positions = first + torch.arange(n, device=self.device)
        is_padding = tokens < 0
        is_padded = any(count < n for count in counts)
        cache.begin(rows, positions, end, counts if is_padded else None)
        shown = positions.masked_fill(is_padding, cache.padding_position)
        with self._padding.at(is_padding if is_padded else None):
            return self.body(tokens.clamp(min=0), shown, self._masks(cache, positions, end), cache)

    def _masks(
        self, cache: SlotCache, positions: Tensor, end: int
    ) -> Tensor | dict[str, Tensor | None] | None:
        """What attention adds to its scores: one mask for all layers, or by their kind, as Transformers names it."""
        masks = {
            name: self._mask(positions, span, cache.columns(name, end))
            for name, span in cache.kinds.spans.items()
        }
        return next(iter(masks.values()), None) if len(masks) < 2 else {**masks, **_NO_MASKS}

    def _mask(self, positions: Tensor, span: Span, columns: int) -> Tensor:
        """[rows, 1, n, columns]: each token sees itself and those before it that are in its span.

        In the dtype that attention computes in; otherwise each layer would convert it.
        """
        places = torch.arange(columns, device=positions.device)
        own = positions.unsqueeze(-1)
        if span.window is None:
            unseen = places > own
        else:
            # In a ring, a place holds the latest position that falls on it.
            last = positions[:, -1:]
            held = (last - (last - places) % columns).unsqueeze(1)
            unseen = (held > own) | (held < 0)
            if span.is_chunked:
                unseen |= held // span.window != own // span.window
            else:
                unseen |= own - held >= span.window
        mask = torch.zeros(unseen.shape, dtype=self.dtype, device=positions.device)
        return mask.masked_fill_(unseen, torch.finfo(self.dtype).min).unsqueeze(1)

    def score_prompt(self, prompt: Prompt, states: Tensor, start: int) -> None:
        """Compute what is requested about the tokens that follow positions [start, start + n); changes the route.

        Args:
            states: hidden states [n, hidden]; those beyond the prompt's end are ignored.
        """
        scores = prompt.scores
        if scores is None:
            return
        first, end = max(scores.first_row, start), min(scores.rows, start + len(states))
        if first >= end:
            return
        self.route.groups = self.routes.make([prompt.adapter])
        step = max(1, PROMPT_LOGITS // int(self.config.get_text_config().vocab_size))
        for row in range(first, end, step):
            piece = states[row - start : min(row + step, end) - start]
            scores.read(row, self.logits(piece.unsqueeze(0)).squeeze(0))
