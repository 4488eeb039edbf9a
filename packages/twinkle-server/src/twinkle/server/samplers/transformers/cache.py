"""What layers keep of sequences, one row per sequence.

    keys, values    by layer: [rows, heads, length, head_dim]. A layer that reads a window has a ring of the last
                    positions: position p is at p % length
    states          by layer: [rows, ...], of convolutions and of recurrences

Rows in use are at the front, so that layers read views: when a row is given up, the last one moves into its place.
The tensors grow as more rows and lengths are needed, and are freed when the batch is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from twinkle.server.backends.hf.device_memory import is_out_of_memory
from twinkle.server.backends.lora.transfer import to_device
from twinkle.server.samplers.cache_usage import RowCost
from twinkle.server.samplers.transformers.layer_kinds import LayerKinds, Span
from twinkle.server.samplers.transformers.memory import CacheFull, CacheMemory

LENGTH_BLOCK = 64
# Most that is allocated beyond what is needed, so that growing is rare: in length, and in rows x length.
MOST_SPARE_LENGTH = 1024
MOST_SPARE_TOKENS = 2**14

# "keys", "values", "conv" or "recurrent"; the layer; and which of its states.
Name: TypeAlias = tuple[str, int, int]


@dataclass(frozen=True, eq=False)
class RowContents:
    """What layers keep of one sequence.

    Attributes:
        length: tokens that it stands for.
        keys_values: [heads, kept, head_dim]: of the last `kept` tokens.
        states: after the last token.
    """

    length: int
    keys_values: dict[Name, Tensor] = field(default_factory=dict[Name, Tensor])
    states: dict[Name, Tensor] = field(default_factory=dict[Name, Tensor])

    def usable(self, length: int) -> int:
        """How many of the sequence's first `length` tokens this can be cut to: all, or none."""
        if length >= self.length:
            return self.length
        is_whole = all(tensor.shape[1] == self.length for tensor in self.keys_values.values())
        return length if is_whole and not self.states else 0

    def cut(self, length: int) -> RowContents:
        """What layers keep of the first `length` tokens, which must be usable."""
        if length == self.length:
            return self
        return RowContents(length, {name: tensor[:, :length] for name, tensor in self.keys_values.items()})

    def clone(self) -> RowContents:
        return RowContents(
            self.length,
            {name: tensor.clone() for name, tensor in self.keys_values.items()},
            {name: tensor.clone() for name, tensor in self.states.items()},
        )


class SlotCache:
    """A cache as Transformers models take it, over a batch's rows.

    `begin` says which rows and positions the next forward pass writes; each layer then calls `update`, or reads its
    states and updates them. A pass that fails halfway leaves the states of some layers ahead of others'.
    """

    # Read by models that ask whether they may build their own masks for the cache.
    is_compileable = False

    def __init__(
        self,
        kinds: LayerKinds,
        memory: CacheMemory | None = None,
        longest_pass: int = 1,
        padding_position: int = 0,
    ) -> None:
        """
        Args:
            memory: what its tensors are counted in; default: one without a limit.
            longest_pass: most tokens of a row in one pass.
            padding_position: the position at which padding is computed; see `ModelRunner.forward`.
        """
        self.kinds = kinds
        self._memory = memory or CacheMemory()
        self.padding_position = padding_position
        self._longest_pass = longest_pass
        self._keys_values: dict[Name, Tensor] = {}
        self._states: dict[Name, Tensor] = {}
        self._rings = {layer: self._ring(kinds.spans[mask]) for layer, mask in kinds.attention.items()}
        self._rows = slice(0, 0)
        self._positions = torch.empty(0)
        self._lines: dict[tuple[int, int], Tensor] = {}
        self._counts: Sequence[int] | None = None
        self._own: dict[int, Tensor] = {}
        self._end = 0
        self._capacity = (0, 0)

    # ---------------------------------------------------------------- memory

    def reserve(self, rows: int, length: int) -> None:
        """Make room for rows of this length, keeping the content.

        If memory runs out, the capacity stays the same and nothing is lost: layers that have grown by then are
        harmlessly larger than needed. (One tensor at a time, so that old and new are together for one only.)

        Raises:
            CacheFull: before anything has grown.
        """
        old_rows, old_length = self._capacity
        if rows <= old_rows and length <= old_length:
            return
        exact = max(rows, old_rows), max(_whole_blocks(length) if length > old_length else 0, old_length)
        wanted = exact
        if length > old_length:
            spare = min(old_length // 2, MOST_SPARE_LENGTH, MOST_SPARE_TOKENS // max(1, exact[0]))
            wanted = wanted[0], max(wanted[1], old_length + spare)
        if rows > old_rows:
            spare = min(old_rows, MOST_SPARE_TOKENS // max(1, wanted[1]))
            wanted = max(rows, old_rows + spare), wanted[1]
        if self._growth(*wanted) > self._memory.left:
            wanted = exact
        if (growth := self._growth(*wanted)) > self._memory.left:
            raise CacheFull(f"{rows} rows of {length} tokens want {growth} of {self._memory.left} bytes")
        for name, old in self._keys_values.items():
            self._keys_values[name] = self._memory.grown(old, self._wanted(name, old, *wanted))
        for name, old in self._states.items():
            self._states[name] = self._memory.grown(old, self._wanted(name, old, *wanted))
        self._capacity = wanted

    def _wanted(self, name: Name, old: Tensor, rows: int, length: int) -> tuple[int, ...]:
        """The shape of a layer's tensor with this capacity; at least the old one's."""
        rows = max(rows, old.shape[0])
        if name in self._states:
            return rows, *old.shape[1:]
        return rows, old.shape[1], max(self._length(name[1], length), old.shape[2]), old.shape[3]

    def _growth(self, rows: int, length: int) -> int:
        """Bytes to be taken until the capacity is this; for one tensor, old and new are there at the same time."""
        more = at_once = 0
        for name, old in (*self._keys_values.items(), *self._states.items()):
            size = math.prod(self._wanted(name, old, rows, length)) * old.element_size()
            if size > old.nbytes:
                more, at_once = more + size - old.nbytes, max(at_once, old.nbytes)
        return more + at_once

    def trim(self, rows: int, length: int) -> None:
        """Free memory far beyond what rows of this length need; their content is kept."""
        old_rows, old_length = self._capacity
        if old_rows * old_length <= 4 * rows * length + MOST_SPARE_TOKENS:
            return
        # Set before the layers are trimmed, so that it holds wherever memory runs out: remaining layers are larger.
        self._capacity = (rows, _whole_blocks(length))
        try:
            for name, old in self._keys_values.items():
                self._keys_values[name] = self._memory.trimmed(
                    old, old[:rows, :, : self._length(name[1], self._capacity[1])]
                )
            for name, old in self._states.items():
                self._states[name] = self._memory.trimmed(old, old[:rows])
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def clear(self) -> None:
        """Free the memory."""
        self._memory.free((*self._keys_values.values(), *self._states.values()))
        self._keys_values.clear()
        self._states.clear()
        self._capacity = (0, 0)

    def _ring(self, span: Span) -> int | None:
        """How many positions a layer keeps: the window of a pass's first token, and the pass; None: all."""
        return None if span.window is None else _whole_blocks(span.window - 1 + self._longest_pass)

    def _length(self, layer: int, length: int) -> int:
        """How long a layer's keys and values are for sequences of this length."""
        ring = self._rings[layer]
        return length if ring is None else min(length, ring)

    def columns(self, mask: str, end: int) -> int:
        """How many positions layers with this mask give to attention if the longest row has `end` tokens."""
        ring = self._ring(self.kinds.spans[mask])
        return end if ring is None else min(end, ring)

    # ---------------------------------------------------------------- rows

    def row(self, row: int, length: int) -> RowContents:
        """Views of a row that has `length` tokens; of its last tokens copies, if they are not in one piece."""
        keys_values: dict[Name, Tensor] = {}
        for name, stored in self._keys_values.items():
            window = self.kinds.spans[self.kinds.attention[name[1]]].window
            first = 0 if window is None else max(0, length - window)
            size = stored.shape[2]
            if first // size == max(first, length - 1) // size:
                keys_values[name] = stored[row, :, first % size : first % size + length - first]
            else:
                places = torch.arange(first, length, device=stored.device) % size
                keys_values[name] = stored[row].index_select(1, places)
        return RowContents(length, keys_values, {name: stored[row] for name, stored in self._states.items()})

    def write_rows(self, rows: slice, contents: RowContents) -> None:
        """Begin rows with what `row` gave for other rows, of this or another cache; they must have been reserved.

        The rest of the row is cleared: attention adds its mask to the scores, and a NaN left by the row's last sequence
        would remain one. Allocates only layers that don't exist yet.
        """
        for name, content in contents.keys_values.items():
            stored = self._room(name, content.unsqueeze(0))
            size, kept = stored.shape[2], content.shape[1]
            if contents.length <= size:
                first = contents.length - kept
                stored[rows, :, first : contents.length].copy_(content)
                stored[rows, :, :first].zero_()
                stored[rows, :, contents.length :].zero_()
            else:
                positions = torch.arange(contents.length - kept, contents.length, device=stored.device)
                stored[rows] = 0
                stored[rows, :, positions % size] = content
        for name, content in contents.states.items():
            self._state(name, content.unsqueeze(0))[rows].copy_(content)
        if not contents.states:
            self.clear_states(rows)

    def clear_states(self, rows: slice) -> None:
        """Begin rows with the states that a sequence begins with."""
        for stored in self._states.values():
            stored[rows].zero_()

    # ---------------------------------------------------------------- a pass

    def begin(self, rows: slice, positions: Tensor, end: int, counts: Sequence[int] | None = None) -> None:
        """
        Args:
            rows: written by the next pass.
            positions: int64 [rows, tokens], where each token's key and value go.
            end: attention reads positions [0, end).
            counts: each row's tokens, if some rows are padded.
        """
        self._rows, self._positions, self._end, self._counts = rows, positions, end, counts
        self._lines = {}
        self._own = {}

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [rows, heads, tokens, head_dim]; returns all that it should read."""
        return self._store(("keys", layer, 0), key), self._store(("values", layer, 0), value)

    def _store(self, name: Name, new: Tensor) -> Tensor:
        stored = self._room(name, new)
        stored.view(-1, stored.shape[3]).index_copy_(0, self._lines_of(stored), new.reshape(-1, new.shape[3]))
        return stored[self._rows, :, : self._length(name[1], self._end)]

    def _room(self, name: Name, like: Tensor) -> Tensor:
        """A layer's tensor, allocated when its shape is first known: that of `like`, [rows, heads, n, head_dim]."""
        stored = self._keys_values.get(name)
        if stored is None:
            rows, length = self._capacity
            stored = self._memory.zeros(
                like, (rows, like.shape[1], self._length(name[1], length), like.shape[3])
            )
            self._keys_values[name] = stored
        return stored

    def _lines_of(self, stored: Tensor) -> Tensor:
        """Where the new keys or values go: int64 [rows * heads * tokens], row indices of the tensor as a table."""
        _, heads, length, _ = stored.shape
        lines = self._lines.get((heads, length))
        if lines is None:
            rows = torch.arange(self._rows.start, self._rows.stop, device=stored.device).view(-1, 1, 1)
            head = torch.arange(heads, device=stored.device).view(1, -1, 1)
            lines = (rows * heads + head) * length + (self._positions % length).unsqueeze(1)
            lines = self._lines[heads, length] = lines.flatten()
        return lines

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The model gets explicit positions; this is only called by code that would compute them."""
        return self._end

    # ---------------------------------------------------------------- states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A view of the rows' last inputs of a convolution [rows, channels, kernel]; None: no row has any."""
        return self._view(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A view of the rows' states [rows, ...]; None: no row has any."""
        return self._view(("recurrent", layer_idx, state_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        layers = {name[1] for name in self._states}
        return bool(layers) if layer_idx is None else layer_idx in layers

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether states are kept for going back to them."""
        return False

    @property
    def layers(self) -> _Layers:
        """Where models of Transformers 5.17 read what they get from the methods above in later versions."""
        return _Layers(self)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Store a convolution's new inputs [rows, channels, tokens]; returns them behind those stored before."""
        if conv_kernel_size is None:
            raise ValueError("a convolution doesn't say how many of its inputs are to be kept")
        like = conv_states[..., :1].expand(-1, -1, conv_kernel_size)
        stored = self._state(("conv", layer_idx, state_idx), like)[self._rows]
        whole = torch.cat([stored, conv_states], dim=-1)
        if self._counts is None:
            stored.copy_(whole[..., -conv_kernel_size:])
        else:
            own = self._last_own(conv_kernel_size, whole.device)
            stored.copy_(whole.gather(2, own.expand(-1, whole.shape[1], -1)))
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Store the states after each row's last token [rows, ...]."""
        stored = self._state(("recurrent", layer_idx, state_idx), recurrent_states)[self._rows]
        if stored.data_ptr() != recurrent_states.data_ptr():
            stored.copy_(recurrent_states)
        return stored

    def _view(self, name: Name) -> Tensor | None:
        stored = self._states.get(name)
        return None if stored is None else stored[self._rows]

    def _state(self, name: Name, like: Tensor) -> Tensor:
        """A layer's states, allocated when their shape is first known: that of `like`, [rows, ...]."""
        stored = self._states.get(name)
        if stored is None:
            stored = self._states[name] = self._memory.zeros(like, (self._capacity[0], *like.shape[1:]))
        return stored

    def _last_own(self, kernel: int, device: torch.device) -> Tensor:
        """Of `kernel` stored inputs and a pass's, where each row's last ones are: int64 [rows, 1, kernel]."""
        own = self._own.get(kernel)
        if own is None:
            assert self._counts is not None
            counts = to_device(torch.tensor(self._counts), device).view(-1, 1, 1)
            own = self._own[kernel] = counts + torch.arange(kernel, device=device)
        return own

    # ---------------------------------------------------------------- sizes

    def row_cost(self) -> RowCost:
        """What a row takes, by what the layers have been seen to keep."""
        growing = windowed = window = 0
        for name, stored in self._keys_values.items():
            token = stored.shape[1] * stored.shape[3] * stored.element_size()
            ring = self._rings[name[1]]
            if ring is None:
                growing += token
            else:
                windowed, window = windowed + token, ring
        return RowCost(growing, windowed, window, _bytes(stored[:1] for stored in self._states.values()))


class _Layers:
    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache

    def __getitem__(self, layer: int) -> _LayerStates:
        return _LayerStates(self._cache, layer)


class _LayerStates:
    """A layer's states, under the names that they have in Transformers 5.17."""

    def __init__(self, cache: SlotCache, layer: int) -> None:
        self.record_past = cache.is_recording_past(layer)
        self.conv_states = _in_order(lambda i: cache.get_conv_state(layer, i))
        self.recurrent_states = _in_order(lambda i: cache.get_recurrent_state(layer, i))


def _in_order(state: Callable[[int], Tensor | None]) -> list[Tensor]:
    """The first states of a layer, up to one that it does not have."""
    found: list[Tensor] = []
    while (one := state(len(found))) is not None:
        found.append(one)
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _whole_blocks(length: int) -> int:
    return -(-length // LENGTH_BLOCK) * LENGTH_BLOCK
