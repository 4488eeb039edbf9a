"""Rows of different lengths behind each other, [1, tokens], without padding.

Everything but attention goes by token and never sees which row one is of: norms, projections, feed-forward layers, the
head, low-rank terms. Attention gets rows of similar length side by side, padded at the right for this one product:
it is causal, so what comes behind a row's end can't affect the row.

Only softmax attention over all of a row can be handed rows like that: with a window Transformers makes the mask, and
linear attention carries a state from token to token. `packs` tells which models can be packed, by trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from twinkle.protocol.types import Array, Int64Array
from twinkle.server.backends.hf.base_model import LOADING_ERRORS
from twinkle.server.backends.lora.transfer import to_device

NAME = "twinkle_packed"
_PLAIN = "sdpa"
# Rows stand side by side in attention if the shortest is at least this part of the longest.
_SIMILAR = 0.75
# Rows of the trial, and how much a token's hidden state may differ from that of its row alone, by whether it has 16
# bits.
_TRIAL = (5, 9, 3, 7)
_TOLERANCE = {False: 3e-3, True: 0.05}


@dataclass(frozen=True, eq=False)
class PackedRows:
    """How rows of a micro-batch are packed.

    Attributes:
        lengths: each row's tokens, in order.
        positions: int64 [1, tokens], each token's place in its row.
        groups: rows that stand side by side in attention, and what they are padded to there.
        token_of: int64 [sum of the groups' padded tokens], the token at each place; at padding any.
        place_of: int64 [tokens], the inverse.
        row_token_of, row_place_of: the same for all rows side by side, in order, padded to the longest.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    groups: tuple[tuple[int, int], ...]
    token_of: Tensor
    place_of: Tensor
    row_token_of: Tensor
    row_place_of: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedRows:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        for i in order:
            if not groups or lengths[i] < _SIMILAR * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(i)
        sizes = [(len(group), lengths[group[0]]) for group in groups]
        in_order = [(list(range(len(lengths))), max(lengths))]
        side_by_side = [(group, longest) for group, (_, longest) in zip(groups, sizes, strict=True)]
        positions = np.concatenate([np.arange(length) for length in lengths])
        arrays = [positions, *_places(lengths, side_by_side), *_places(lengths, in_order)]
        # One transfer for all.
        together = to_device(torch.from_numpy(np.concatenate(arrays)), device)
        on_device = together.split([len(array) for array in arrays])
        return cls(tuple(lengths), on_device[0].unsqueeze(0), tuple(sizes), *on_device[1:])

    def concatenated(
        self, arrays: Sequence[Array], dtype: type[np.float32] | type[np.int64], device: torch.device
    ) -> Tensor:
        """[T_i] or [T_i, K_i] each to [1, tokens, widest], with zeros at the right of narrower ones."""
        columns = [array[:, None] if array.ndim == 1 else array for array in arrays]
        widest = max(array.shape[1] for array in columns)
        filled = np.zeros((1, sum(self.lengths), widest), dtype)
        start = 0
        for array in columns:
            filled[0, start : start + len(array), : array.shape[1]] = array
            start += len(array)
        return to_device(torch.from_numpy(filled), device)

    def side_by_side(self, packed: Tensor) -> Tensor:
        """[1, tokens, k] to [rows, longest, k], with any tokens' values behind a row's end."""
        return packed[0].index_select(0, self.row_token_of).view(len(self.lengths), -1, packed.shape[2])

    def packed(self, rows: Tensor) -> Tensor:
        """[rows, longest, k] to [1, tokens, k]."""
        return rows.flatten(0, 1).index_select(0, self.row_place_of).unsqueeze(0)


def _places(
    lengths: Sequence[int], groups: Sequence[tuple[Sequence[int], int]]
) -> tuple[Int64Array, Int64Array]:
    """`token_of` and `place_of`, for rows given in groups that are padded to a length each."""
    starts = np.cumsum([0, *lengths])
    token_of = np.zeros(sum(len(group) * longest for group, longest in groups), np.int64)
    place_of = np.empty(int(starts[-1]), np.int64)
    place = 0
    for group, longest in groups:
        for row in group:
            own = np.arange(lengths[row])
            token_of[place : place + lengths[row]] = starts[row] + own
            place_of[starts[row] : starts[row + 1]] = place + own
            place += longest
    return token_of, place_of


# ---------------------------------------------------------------- attention


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' interface of attention: [1, heads, tokens, dim] each to [1, tokens, heads, dim].

    Without `packed_rows`, of rows side by side, [rows, heads, tokens, dim].
    """
    plain = cast("Callable[..., tuple[Tensor, Tensor | None]]", ALL_ATTENTION_FUNCTIONS[_PLAIN])
    if packed_rows is None:
        return plain(module, query, key, value, attention_mask, **settings)
    padded = [_padded(packed_rows, tensor) for tensor in (query, key, value)]
    found: list[Tensor] = []
    for of_group in zip(*padded, strict=True):
        out, _ = plain(module, *of_group, None, **settings)
        found.append(out.flatten(0, 1))
    together = found[0] if len(found) == 1 else torch.cat(found)
    return _select(together, packed_rows.place_of, packed_rows.token_of).unsqueeze(0), None


def _padded(packed_rows: PackedRows, tensor: Tensor) -> list[Tensor]:
    """[1, heads, tokens, dim] to [rows, heads, longest, dim] of each group."""
    places = _select(tensor[0].transpose(0, 1), packed_rows.token_of, packed_rows.place_of)
    parts = places.split([rows * longest for rows, longest in packed_rows.groups])
    return [
        part.view(rows, longest, *part.shape[1:]).transpose(1, 2)
        for part, (rows, longest) in zip(parts, packed_rows.groups, strict=True)
    ]


def _select(tensor: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return cast("Tensor", _Select.apply(tensor, index, inverse))


class _Select(torch.autograd.Function):
    """`tensor[index]`, of which `inverse` says where each element went that has a gradient, or came from.

    From tokens to places, padding is a copy of some token and gets no gradient, so that a token's gradient is that of
    its one place. From places to tokens, padding gets a gradient of zero.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        tensor, index, inverse = args
        ctx.save_for_backward(index, inverse)
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        [grad] = grad_outputs
        if len(index) >= len(inverse):  # from tokens to places
            return grad.index_select(0, inverse), None, None
        found = grad.new_zeros(len(inverse), *grad.shape[1:])
        return found.index_copy_(0, index, grad), None, None


AttentionInterface.register(NAME, cast("Any", _attention))


# ---------------------------------------------------------------- which models can be packed


def may_pack(model: PreTrainedModel) -> bool:
    """Whether by its configuration all of a model's layers are softmax attention over all of a row."""
    text: Any = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    has_window = any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if kinds is None and has_window:
        return False
    return (
        text._attn_implementation == _PLAIN  # pyright: ignore[reportPrivateUsage]
        and set(kinds or ["full_attention"]) == {"full_attention"}
        and not any(isinstance(module, nn.Conv1d) for module in model.modules())
    )


def use_packed_attention(config: PreTrainedConfig) -> None:
    """Have a module tree with this configuration, its own, compute attention here."""
    config.get_text_config()._attn_implementation = NAME  # pyright: ignore[reportPrivateUsage]


def packs(hidden: Callable[[Tensor, PackedRows | None], Tensor], device: torch.device) -> bool:
    """Whether a model gives packed rows the hidden states that each has alone.

    Args:
        hidden: hidden states of token ids, int64 [rows, n], or of packed rows, [1, n].
    """
    rows = [torch.arange(1, length + 1, device=device) for length in _TRIAL]
    packed_rows = PackedRows.of(_TRIAL, device)
    try:
        with torch.no_grad():
            found = hidden(torch.cat(rows).unsqueeze(0), packed_rows)[0].split(_TRIAL)
            alone = [hidden(row.unsqueeze(0), None)[0] for row in rows]
    except LOADING_ERRORS:
        return False
    # Of tokens behind the first row; in 16 bits some may be sent to other experts.
    one, other = torch.cat(found[1:]).float(), torch.cat(alone[1:]).float()
    differences = (one - other).norm(dim=-1) / other.norm(dim=-1)
    return bool(differences.median() <= _TOLERANCE[found[0].dtype != torch.float32])
