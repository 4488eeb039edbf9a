"""Keys and values of the running batch, one row a sequence.

    keys, values    by layer: [rows, heads, length, head_dim]

Rows that are in use stand at the front, so that what attention reads is a view: when a sequence ends, the last row
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
        self._write: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
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

    def copy_row(self, source: int, targets: list[int], length: int) -> None:
        for tensor in (*self.keys, *self.values):
            assert tensor is not None
            # A copy of its own: torch refuses to write into the memory that it reads from, and notices that it does
            # where the rows are read to their full length.
            tensor[targets, :, :length] = tensor[source, :, :length].clone()

    def begin(self, rows: slice, positions: Tensor, end: int) -> None:
        """
        Args:
            rows: those that the pass is about.
            positions: int64 [rows, tokens], where each token's key and value go.
            end: attention reads positions [0, end).
        """
        row_numbers = torch.arange(rows.start, rows.stop, device=positions.device).unsqueeze(1)
        self._rows, self._write, self._end = rows, (row_numbers, positions), end

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [rows, heads, tokens, head_dim]; returns all it is to read."""
        return self._store(self.keys, key, layer), self._store(self.values, value, layer)

    def _store(self, tensors: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        stored = tensors[layer]
        if stored is None:
            rows, length = self._capacity
            stored = tensors[layer] = new.new_zeros(rows, new.shape[1], length, new.shape[3])
        rows, positions = self._write
        stored[rows, :, positions] = new.transpose(1, 2)
        return stored[self._rows, :, : self._end]

    def get_seq_length(self, layer: int = 0) -> int:
        """Positions are given to the model; this is only asked for by code that would work them out."""
        return self._end
