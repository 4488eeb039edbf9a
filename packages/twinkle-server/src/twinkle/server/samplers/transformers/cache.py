"""Keys and values, one row per sequence.

    keys, values    by layer: [rows, heads, length, head_dim]

Rows in use are at the front, so that attention reads a view: when a row is given up, the last one moves into its place.
The tensors grow as more rows and lengths are needed, and are freed when the batch is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinkle.server.samplers.transformers.memory import is_out_of_memory

LENGTH_BLOCK = 64
# Most that is allocated beyond what is needed, so that growing is rare: in length, and in rows x length.
MOST_SPARE_LENGTH = 1024
MOST_SPARE_TOKENS = 2**14


class SlotCache:
    """A cache as Transformers models take it, over a batch's rows.

    `begin` says which rows and positions the next forward pass writes; each layer then calls `update`.
    """

    # Read by models that ask whether they may build their own masks for the cache.
    is_compileable = False

    def __init__(self, num_layers: int, padding_position: int = 0) -> None:
        """
        Args:
            padding_position: the position at which padding is computed; see `ModelRunner.forward`.
        """
        self.padding_position = padding_position
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self._rows = slice(0, 0)
        self._positions = torch.empty(0)
        self._lines: dict[tuple[int, int], Tensor] = {}
        self._end = 0
        self._capacity = (0, 0)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for rows of this length, keeping the content.

        If memory runs out, the capacity stays the same and nothing is lost: layers that have grown by then are
        harmlessly larger than needed. (One layer at a time, so that old and new memory are held together for one layer
        only.)
        """
        old_rows, old_length = self._capacity
        if rows <= old_rows and length <= old_length:
            return
        new_rows, new_length = old_rows, old_length
        if length > old_length:
            spare = min(old_length // 2, MOST_SPARE_LENGTH)
            new_length = max(_whole_blocks(length), old_length + spare)
        if rows > old_rows:
            new_rows = max(rows, min(2 * old_rows, old_rows + MOST_SPARE_TOKENS // max(1, new_length)))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old is not None and (old.shape[0] < new_rows or old.shape[2] < new_length):
                    tensors[layer] = _grown(old, new_rows, new_length)
        self._capacity = (new_rows, new_length)

    def trim(self, rows: int, length: int) -> None:
        """Free memory far beyond what rows of this length need; their content is kept."""
        old_rows, old_length = self._capacity
        if old_rows * old_length <= 4 * rows * length + MOST_SPARE_TOKENS:
            return
        # Set before the layers are trimmed, so that it holds wherever memory runs out: remaining layers are larger.
        self._capacity = (rows, _whole_blocks(length))
        try:
            for tensors in (self.keys, self.values):
                for layer, old in enumerate(tensors):
                    if old is not None:
                        kept = old[: self._capacity[0], :, : self._capacity[1]]
                        tensors[layer] = kept.clone(memory_format=torch.contiguous_format)
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def clear(self) -> None:
        """Free the memory."""
        self.keys = [None] * len(self.keys)
        self.values = [None] * len(self.values)
        self._capacity = (0, 0)

    def row(self, row: int, length: int) -> list[Tensor]:
        """Views of a row's first `length` keys and values: [heads, length, head_dim] for each layer's keys, then for
        each layer's values.
        """
        return [tensor[row, :, :length] for tensor in (*self.keys, *self.values) if tensor is not None]

    def write_rows(self, rows: slice, contents: list[Tensor]) -> None:
        """Begin rows with what `row` gave for other rows, of this or another cache; they must have been reserved.

        The rest of the row is cleared: attention adds its mask to the scores, and a NaN left by the row's last sequence
        would remain one. Allocates only layers that don't exist yet.
        """
        layers = len(self.keys)
        for i, content in enumerate(contents):
            stored = self._room((self.keys, self.values)[i // layers], i % layers, content.unsqueeze(0))
            length = content.shape[1]
            stored[rows, :, :length].copy_(content)
            stored[rows, :, length:].zero_()

    def begin(self, rows: slice, positions: Tensor, end: int) -> None:
        """
        Args:
            rows: written by the next pass.
            positions: int64 [rows, tokens], where each token's key and value go.
            end: attention reads positions [0, end).
        """
        self._rows, self._positions, self._end = rows, positions, end
        self._lines = {}

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [rows, heads, tokens, head_dim]; returns all that it should read."""
        return self._store(self.keys, key, layer), self._store(self.values, value, layer)

    def _store(self, tensors: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        stored = self._room(tensors, layer, new)
        stored.view(-1, stored.shape[3]).index_copy_(0, self._lines_of(stored), new.reshape(-1, new.shape[3]))
        return stored[self._rows, :, : self._end]

    def _room(self, tensors: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        """A layer's tensor, allocated when its shape is first known: that of `like`, [rows, heads, n, head_dim]."""
        stored = tensors[layer]
        if stored is None:
            rows, length = self._capacity
            stored = tensors[layer] = like.new_zeros(rows, like.shape[1], length, like.shape[3])
        return stored

    def _lines_of(self, stored: Tensor) -> Tensor:
        """Where the new keys or values go: int64 [rows * heads * tokens], row indices of the tensor as a table."""
        _, heads, length, _ = stored.shape
        lines = self._lines.get((heads, length))
        if lines is None:
            rows = torch.arange(self._rows.start, self._rows.stop, device=stored.device).view(-1, 1, 1)
            head = torch.arange(heads, device=stored.device).view(1, -1, 1)
            lines = (rows * heads + head) * length + self._positions.unsqueeze(1)
            lines = self._lines[heads, length] = lines.flatten()
        return lines

    def get_seq_length(self, layer: int = 0) -> int:
        """The model gets explicit positions; this is only called by code that would compute them."""
        return self._end


def _whole_blocks(length: int) -> int:
    return -(-length // LENGTH_BLOCK) * LENGTH_BLOCK


def _grown(old: Tensor, rows: int, length: int) -> Tensor:
    """A tensor for at least these rows and this length, with the old one's content and zeros elsewhere."""
    new = old.new_zeros(max(rows, old.shape[0]), old.shape[1], max(length, old.shape[2]), old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
