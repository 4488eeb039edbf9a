"""The order in which rows are seen, epoch after epoch, as a function of seed, epoch and position alone."""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypedDict, TypeVar, cast

import numpy as np

from twinkle.protocol.errors import InvalidRequest

Item_co = TypeVar("Item_co", covariant=True)


class Rows(Protocol[Item_co]):
    """Anything with a length and numbered items: a `Dataset`, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item_co: ...


class DataLoaderState(TypedDict):
    """Where a loader is, in numbers that JSON can hold.

    Keys:
        epoch: from 0.
        position: batches of that epoch that were handed out.
        seed, shuffle, batch_size, drop_last, rows: what the order depends on; must be the same on resuming.
    """

    epoch: int
    position: int
    seed: int
    shuffle: bool
    batch_size: int
    drop_last: bool
    rows: int


class DataLoader(Generic[Item_co]):
    """Yields lists of a dataset's items; each `for` loop over it is one epoch.

    The order differs from epoch to epoch and is the same in every run with the same seed. A loop that is left
    early ends its epoch; after `load_state_dict` the next loop goes on where the state was taken.

    Args:
        dataset: what to take from; an encoded `Dataset` gives lists of `InputFeature`.
        batch_size: items a batch; the last of an epoch may have fewer.
        shuffle: whether to take the items in a random order.
        seed: of that order, from 0.
        drop_last: leave a last, smaller batch out.

    Raises:
        InvalidRequest: if a number is out of its range.
    """

    def __init__(
        self,
        dataset: Rows[Item_co],
        batch_size: int = 8,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        for field, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise InvalidRequest(f"{field}: {value}; allowed are whole numbers from {least}")
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._epoch = 0
        self._position = 0
        self._resuming = False

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self.state_dict()["epoch"]

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        rows = len(self._dataset)
        return rows // self._batch_size if self._drop_last else -(-rows // self._batch_size)

    def __iter__(self) -> Iterator[list[Item_co]]:
        """The batches of an epoch, or of the rest of one after `load_state_dict`.

        Raises:
            InvalidRequest: if there is not one batch, which would make a training that does nothing.
        """
        if len(self) == 0:
            rows = f"{len(self._dataset)} rows"
            raise InvalidRequest(
                f"dataset: {rows} make no batch of {self._batch_size} with drop_last={self._drop_last}"
            )
        if self._position and not self._resuming:
            self._move(self._epoch + 1, 0)
        self._resuming = False
        epoch, order = self._epoch, self._order(self._epoch)
        for position in range(self._position, len(self)):
            begin = position * self._batch_size
            batch = [self._dataset[int(index)] for index in order[begin : begin + self._batch_size]]
            # Counted before it is handed out: whoever saves the state has it.
            self._move(epoch, position + 1)
            yield batch

    def state_dict(self) -> DataLoaderState:
        """Where the loader is. Batches handed out count as used."""
        done = self._position > 0 and self._position >= len(self)
        return DataLoaderState(
            epoch=self._epoch + 1 if done else self._epoch,
            position=0 if done else self._position,
            seed=self._seed,
            shuffle=self._shuffle,
            batch_size=self._batch_size,
            drop_last=self._drop_last,
            rows=len(self._dataset),
        )

    def load_state_dict(self, state: DataLoaderState | Mapping[str, Any]) -> None:
        """Go on where `state` was taken: the next loop yields the rest of that epoch.

        Raises:
            InvalidRequest: if this loader would not go through the same rows in the same order.
        """
        own = cast(Mapping[str, Any], self.state_dict())
        missing = [key for key in own if key not in state]
        if missing:
            raise InvalidRequest(f"state: {', '.join(missing)} missing; give what state_dict() returned")
        for key in ("seed", "shuffle", "batch_size", "drop_last", "rows"):
            if state[key] != own[key]:
                raise InvalidRequest(
                    f"state: it was taken with {key}={state[key]}, and this loader has {key}={own[key]}; make them the "
                    "same to resume"
                )
        if state["epoch"] < 0 or not 0 <= state["position"] < max(1, len(self)):
            raise InvalidRequest(
                f"state: epoch {state['epoch']}, position {state['position']} of {len(self)} batches"
            )
        self._move(state["epoch"], state["position"])
        self._resuming = True

    def _move(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The items' numbers in the order of an epoch, int64 [rows]."""
        rows = len(self._dataset)
        if not self._shuffle:
            return np.arange(rows)
        # RandomState and not Generator: its streams never change from one numpy release to the next (NEP 19).
        bits = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
        return np.random.RandomState(bits).permutation(rows).astype(np.int64)
