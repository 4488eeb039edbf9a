"""The order of rows in each epoch, as a function of only seed, epoch and position."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Generic, Protocol, TypedDict, TypeVar, cast, runtime_checkable

import numpy as np

from twinkle.protocol.errors import InvalidRequest

Item_co = TypeVar("Item_co", covariant=True)


class Rows(Protocol[Item_co]):
    """Anything with a length and numbered items: a `Dataset`, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item_co: ...


@runtime_checkable
class Stream(Protocol[Item_co]):
    """Anything that yields items epoch by epoch, without a length: an `IterableDataset`."""

    def epoch(self, number: int, /) -> Iterator[Item_co]: ...


class DataLoaderState(TypedDict):
    """A loader's position, as JSON values.

    Keys:
        epoch: from 0.
        position: batches of that epoch that were yielded.
        seed, shuffle, batch_size, drop_last, rows: determine the order; must be the same on resuming. `rows` is None
            for a stream.
    """

    epoch: int
    position: int
    seed: int
    shuffle: bool
    batch_size: int
    drop_last: bool
    rows: int | None


class DataLoader(Generic[Item_co]):
    """Yields lists of a dataset's items; each `for` loop over it is one epoch.

    The order differs between epochs and is the same in every run with the same seed. Leaving a loop early ends its
    epoch; after `load_state_dict` the next loop continues where the state was taken.

    A stream (`IterableDataset`) determines its own order, which differs between epochs after its
    `shuffle(buffer_size)`. It is read one batch ahead, to detect the last one. Resuming reads and encodes the used part
    of the epoch again and skips it: the following batches are exactly the same, but it takes as long as reading does.

    Args:
        dataset: the source of items; an encoded `Dataset` yields lists of `InputFeature`.
        batch_size: items per batch; the last of an epoch may have fewer.
        shuffle: whether to randomise the order; default: True, except for a stream.
        seed: of that order, from 0.
        drop_last: drop a smaller last batch.

    Raises:
        InvalidRequest: if a number is out of range, `shuffle` is set for a stream, or `dataset` is neither indexable
            nor a stream.
    """

    def __init__(
        self,
        dataset: Rows[Item_co] | Stream[Item_co],
        batch_size: int = 8,
        shuffle: bool | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        for field, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise InvalidRequest(f"{field}: {value}; allowed are whole numbers from {least}")
        # A dataset with both interfaces is used by index.
        is_stream = isinstance(dataset, Stream) and not hasattr(dataset, "__len__")
        if not is_stream:
            _require_numbered(dataset)
        if is_stream and shuffle:
            raise InvalidRequest(
                "shuffle: a stream can't be taken in any order; call dataset.shuffle(buffer_size) before, and leave "
                "shuffle out here"
            )
        self._rows = None if is_stream else cast(Rows[Item_co], dataset)
        self._stream = cast(Stream[Item_co], dataset) if is_stream else None
        self._batch_size = batch_size
        self._shuffle = not is_stream if shuffle is None else shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._epoch = 0
        self._position = 0
        # For a stream: whether the previous batch was its last.
        self._ended = False
        self._resuming = False

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self.state_dict()["epoch"]

    def __len__(self) -> int:
        """Batches per epoch.

        Raises:
            TypeError: for a stream.
        """
        rows = len(self._require_rows())
        return rows // self._batch_size if self._drop_last else -(-rows // self._batch_size)

    def __iter__(self) -> Iterator[list[Item_co]]:
        """The batches of an epoch; after `load_state_dict`, those that remain.

        Raises:
            InvalidRequest: if there is no batch, since training would silently do nothing; or if a stream is shorter
                than when the state was taken.
        """
        if self._stream is None and len(self) == 0:
            raise self._no_batch(len(self._require_rows()))
        if self._position and not self._resuming:
            self._move(self._epoch + 1, 0)
        self._resuming = False
        yield from self._numbered() if self._stream is None else self._streamed(self._stream)

    def _numbered(self) -> Iterator[list[Item_co]]:
        rows, epoch, order = self._require_rows(), self._epoch, self._order(self._epoch)
        for position in range(self._position, len(self)):
            begin = position * self._batch_size
            batch = [rows[int(index)] for index in order[begin : begin + self._batch_size]]
            # Counted before it is yielded: code that saves the state has it.
            self._move(epoch, position + 1)
            yield batch

    def _streamed(self, stream: Stream[Item_co]) -> Iterator[list[Item_co]]:
        epoch, skipped = self._epoch, self._position
        items = stream.epoch(epoch)
        passed = sum(1 for _ in islice(items, skipped * self._batch_size))
        batch = list(islice(items, self._batch_size))
        if not self._is_whole(batch) and skipped == 0:
            raise self._no_batch(len(batch))
        if not self._is_whole(batch):
            raise InvalidRequest(
                f"state: it was taken after {skipped} batches, and the stream ends after {passed + len(batch)} rows; "
                "resume with the same data"
            )
        position = skipped
        while self._is_whole(batch):
            following = list(islice(items, self._batch_size))
            position += 1
            self._move(epoch, position, ended=not self._is_whole(following))
            yield batch
            batch = following

    def _is_whole(self, batch: list[Item_co]) -> bool:
        """Whether these items of a stream are a batch to yield."""
        return len(batch) >= (self._batch_size if self._drop_last else 1)

    def state_dict(self) -> DataLoaderState:
        """The loader's position. Yielded batches count as used."""
        done = self._ended if self._rows is None else self._position > 0 and self._position >= len(self)
        return DataLoaderState(
            epoch=self._epoch + 1 if done else self._epoch,
            position=0 if done else self._position,
            seed=self._seed,
            shuffle=self._shuffle,
            batch_size=self._batch_size,
            drop_last=self._drop_last,
            rows=None if self._rows is None else len(self._rows),
        )

    def load_state_dict(self, state: DataLoaderState | Mapping[str, Any]) -> None:
        """Continue where `state` was taken: the next loop yields the rest of that epoch.

        Raises:
            InvalidRequest: if this loader's rows or their order would differ.
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
        position_is_known = self._rows is None or state["position"] < max(1, len(self))
        if state["epoch"] < 0 or state["position"] < 0 or not position_is_known:
            of = "" if self._rows is None else f" of {len(self)} batches"
            raise InvalidRequest(f"state: epoch {state['epoch']}, position {state['position']}{of}")
        self._move(state["epoch"], state["position"])
        self._resuming = True

    def _move(self, epoch: int, position: int, ended: bool = False) -> None:
        self._epoch = epoch
        self._position = position
        self._ended = ended

    def _require_rows(self) -> Rows[Item_co]:
        if self._rows is None:
            raise TypeError(
                "a DataLoader over a stream has no length: how many rows there are shows at their end"
            )
        return self._rows

    def _no_batch(self, rows: int) -> InvalidRequest:
        return InvalidRequest(
            f"dataset: {rows} rows make no batch of {self._batch_size} with drop_last={self._drop_last}"
        )

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The items' indices in the order of an epoch, int64 [rows]."""
        rows = len(self._require_rows())
        if not self._shuffle:
            return np.arange(rows)
        # RandomState, not Generator: its streams are frozen across numpy releases (NEP 19).
        bits = np.random.MT19937(np.random.SeedSequence([self._seed, epoch]))
        return np.random.RandomState(bits).permutation(rows).astype(np.int64)


def _require_numbered(dataset: object) -> None:
    kind = type(dataset).__name__
    # Strings and dictionaries have a length, but don't yield rows.
    is_numbered = all(hasattr(type(dataset), method) for method in ("__len__", "__getitem__"))
    if not is_numbered or isinstance(dataset, Mapping | str | bytes):
        raise InvalidRequest(
            f"dataset: expected a Dataset, a list (anything with a length and numbered items), or an IterableDataset, "
            f"got {kind}; list(...) or IterableDataset.from_rows(...) makes one of other rows"
        )
