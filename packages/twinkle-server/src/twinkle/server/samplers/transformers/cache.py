"""Keys and values, one row a sequence.

    keys, values    by layer: [rows, heads, length, head_dim]

Rows that are in use stand at the front, so that what attention reads is a view: when a row is given up, the last one
moves into its place. The tensors grow as rows and lengths are asked for, and go when the batch is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH_BLOCK = 64


class SlotCache:
    """What a Transformers model takes for its cache, over the rows of a batch.

    `begin` says which rows and positions the next forward pass writes; each layer then calls `update`.
    """

    # Read by models that ask whether they may build their own masks around the cache.
    is_compileable = False

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self._rows = slice(0, 0)
        self._positions = torch.empty(0)
        self._lines: dict[int, Tensor] = {}
        self._end = 0
        self._capacity = (0, 0)

    def reserve(self, rows: int, length: int) -> None:
        """Have room for so many rows of such a length; what is there is kept."""
        old_rows, old_length = self._capacity
        if rows <= old_rows and length <= old_length:
            return
        new_rows = old_rows if rows <= old_rows else max(rows, 2 * old_rows)
        blocks = -(-length // LENGTH_BLOCK) * LENGTH_BLOCK
        new_length = old_length if length <= old_length else max(blocks, old_length + old_length // 2)
        self._capacity = (new_rows, new_length)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old is not None:
                    tensors[layer] = old.new_zeros(new_rows, old.shape[1], new_length, old.shape[3])
                    tensors[layer][:old_rows, :, :old_length] = old  # pyright: ignore[reportOptionalSubscript]

    def clear(self) -> None:
        """Let go of the memory."""
        self.keys = [None] * len(self.keys)
        self.values = [None] * len(self.values)
        self._capacity = (0, 0)

    def row(self, row: int, length: int) -> list[Tensor]:
        """The first so many keys and values of a row, as views: [heads, length, head_dim] of each layer's keys, then
        of each layer's values.
        """
        return [tensor[row, :, :length] for tensor in (*self.keys, *self.values) if tensor is not None]

    def write_rows(self, rows: list[int], contents: list[Tensor]) -> None:
        """Begin rows with what `row` gave, here or of another cache; they must have been reserved.

        Nothing is left behind it of who had the row before: attention adds its mask to the scores, and what is not a
        number stays so whatever is added.
        """
        layers = len(self.keys)
        for i, content in enumerate(contents):
            stored = self._room((self.keys, self.values)[i // layers], i % layers, content.unsqueeze(0))
            length = content.shape[1]
            # A copy of its own: torch refuses to write into the memory that it reads from.
            stored[rows, :, :length] = content.clone()
            stored[rows, :, length:] = 0

    def begin(self, rows: slice, positions: Tensor, end: int) -> None:
        """
        Args:
            rows: those that the pass is about.
            positions: int64 [rows, tokens], where each token's key and value go.
            end: attention reads positions [0, end).
        """
        self._rows, self._positions, self._end = rows, positions, end
        self._lines = {}

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [rows, heads, tokens, head_dim]; returns all it is to read."""
        return self._store(self.keys, key, layer), self._store(self.values, value, layer)

    def _store(self, tensors: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        stored = self._room(tensors, layer, new)
        stored.view(-1, stored.shape[3]).index_copy_(0, self._lines_of(stored), new.reshape(-1, new.shape[3]))
        return stored[self._rows, :, : self._end]

    def _room(self, tensors: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        """A layer's tensor, which is made when its shape is first seen: that of [rows, heads, n, head_dim]."""
        stored = tensors[layer]
        if stored is None:
            rows, length = self._capacity
            stored = tensors[layer] = like.new_zeros(rows, like.shape[1], length, like.shape[3])
        return stored

    def _lines_of(self, stored: Tensor) -> Tensor:
        """Where the new keys or values go: int64 [rows * heads * tokens], as lines of the tensor seen as a table."""
        _, heads, length, _ = stored.shape
        lines = self._lines.get(heads)
        if lines is None:
            rows = torch.arange(self._rows.start, self._rows.stop, device=stored.device).view(-1, 1, 1)
            head = torch.arange(heads, device=stored.device).view(1, -1, 1)
            lines = (rows * heads + head) * length + self._positions.unsqueeze(1)
            lines = self._lines[heads] = lines.flatten()
        return lines

    def get_seq_length(self, layer: int = 0) -> int:
        """Positions are given to the model; this is only asked for by code that would work them out."""
        return self._end
