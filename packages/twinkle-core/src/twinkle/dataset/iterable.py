"""A streaming dataset: read while it is used, never entirely in memory, and of unknown length."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self, TypeAlias

import numpy as np

from twinkle.dataset.encoding import EncodedRow, Encoder, check_left, check_trained, encode_pair, encode_row
from twinkle.dataset.meta import DatasetMeta, MetaLike, as_metas
from twinkle.dataset.mixing import Stop, check_mixing, mix
from twinkle.dataset.readers import Row
from twinkle.dataset.rows import (
    LocatedRow,
    Step,
    apply_step,
    filtering,
    find_template,
    forward_slice,
    made_by_hand,
    mapping,
    require_template,
    source_reader,
)
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

logger = logging.getLogger(__name__)

Stream: TypeAlias = Callable[[int], Iterator[LocatedRow]]
"""From an epoch's number to its rows, which each call reads again."""


class IterableDataset:
    """Rows from one or several sources, read from their files while they are used.

    Only the current row and the buffer of `shuffle` are in memory. (Except for a JSON file that is one list, which must
    be read as a whole.) There is no length and no index; `for` and `DataLoader` can iterate any number of times.
    Methods add steps to be applied to the rows, in the order of the calls, and return the dataset itself.

    Args:
        dataset_meta: the source, or several, read one after the other; a string or path means `DatasetMeta(id)`.
            `data_slice` must go forward.

    Raises:
        NotFound: if a source, or the requested files in it, can't be found.
        InvalidRequest: if a `data_slice` needs all rows in memory, or if the argument is not a source.
    """

    def __init__(self, dataset_meta: MetaLike | Iterable[MetaLike] = ()) -> None:
        sources = [_source(meta) for meta in as_metas(dataset_meta)]
        self._stream: Stream = lambda epoch: (item for source in sources for item in source(epoch))
        self._template: Template | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]],
        name: str = "rows",
    ) -> Self:
        """A dataset of existing rows; `name` stands for the file in error messages.

        Args:
            rows: something that can be iterated repeatedly, such as a list; or a function that returns a new iterator
                at each call, such as a generator function.

        Raises:
            InvalidRequest: if it can be iterated only once. While rows are read, naming the row's number, if one is not
                an object with columns.
        """
        if not callable(rows) and iter(rows) is rows:
            raise InvalidRequest(
                f"rows: a {type(rows).__name__} can be read only once, and each epoch reads again; give the function "
                "that makes it"
            )
        dataset = cls()
        dataset._stream = lambda _: made_by_hand(rows() if callable(rows) else rows, name)
        return dataset

    @classmethod
    def mix(
        cls,
        datasets: Sequence["IterableDataset"],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        stop: Stop = "all_exhausted",
    ) -> Self:
        """A dataset that takes its rows from others, in turn or at random by weights; see `Dataset.mix_dataset`.

        Later changes to those don't affect it. Each epoch draws in a different order.

        Args:
            datasets: either all encoded, or none.
            weights: relative frequency of each; default: take one row of each in turn.
            seed: of the random choice, from 0.
            stop: "all_exhausted" continues with those that have rows left; "first_exhausted" stops at the first that
                has none.

        Raises:
            InvalidRequest: if the weights are not one per dataset, not numbers from 0, or all 0; or if another argument
                is out of range.
        """
        check_mixing(weights, len(datasets), seed, stop)
        streams = [dataset._stream for dataset in datasets]
        dataset = cls()
        dataset._stream = lambda epoch: mix(
            [stream(epoch) for stream in streams], weights, [seed, epoch], stop
        )
        return dataset

    def set_template(self, template: str | Template, **options: Any) -> Self:
        """Choose what `encode` uses; see `Dataset.set_template`."""
        self._template = find_template(template, options)
        return self

    def map(self, processor: Callable[[Row], Mapping[str, Any] | None]) -> Self:
        """Replace each row by what `processor` returns for it; None drops the row.

        Raises:
            InvalidRequest: if it is not a function of a row. While rows are read, naming file and line, if it fails.
        """
        return self._add(mapping(processor))

    def filter(self, keep: Callable[[Row], object]) -> Self:
        """Drop the rows for which `keep` is false.

        Raises:
            InvalidRequest: if it is not a function of a row. While rows are read, naming file and line, if it fails.
        """
        return self._add(filtering(keep))

    def encode(self, add_generation_prompt: bool = False) -> Self:
        """Replace each row's conversation by the template's `InputFeature`; see `Dataset.encode`.

        Args:
            add_generation_prompt: end each sequence with the opening of an assistant turn, to sample from.

        Raises:
            InvalidRequest: if no template was set. While rows are read, naming file and line, if one is not a
                conversation; after the last, if there were none, none was left, or none had a token to train on.
        """
        return self._encode("encode", encode_row, add_generation_prompt)

    def encode_pairs(self) -> Self:
        """Replace each row's `chosen` and `rejected` by their features; see `Dataset.encode_pairs`.

        Raises:
            InvalidRequest: as in `encode`.
        """
        return self._encode("encode_pairs", encode_pair, False)

    def shuffle(self, buffer_size: int, seed: int = 0) -> Self:
        """Shuffle within a buffer: each row is drawn at random from the next `buffer_size`.

        Shuffle before `encode`, so that the buffer holds text; sorted files need a large one. The order differs between
        epochs, and is the same in every run with the same seed.

        Args:
            buffer_size: rows held in memory.
            seed: of the order, from 0.

        Raises:
            InvalidRequest: if a number is out of range.
        """
        _require_least("buffer_size", buffer_size, 1)
        _require_least("seed", seed, 0)
        stream = self._stream
        self._stream = lambda epoch: _shuffled(stream(epoch), buffer_size, [seed, epoch])
        return self

    def take(self, count: int) -> Self:
        """Stop after `count` rows."""
        _require_least("count", count, 0)
        stream = self._stream
        self._stream = lambda epoch: islice(stream(epoch), count)
        return self

    def skip(self, count: int) -> Self:
        """Skip the first `count` rows."""
        _require_least("count", count, 0)
        stream = self._stream
        self._stream = lambda epoch: islice(stream(epoch), count, None)
        return self

    def epoch(self, number: int) -> Iterator[Row]:
        """The rows of an epoch, from 0; the random order differs between epochs."""
        return (item.row for item in self._stream(number))

    def __iter__(self) -> Iterator[Row]:
        return self.epoch(0)

    def _add(self, step: Step) -> Self:
        stream = self._stream
        self._stream = lambda epoch: _stepped(stream(epoch), step)
        return self

    def _encode(
        self, method: str, encode_one: Callable[[Encoder, Row], EncodedRow], add_generation_prompt: bool
    ) -> Self:
        encoder = Encoder(require_template(self._template, method), add_generation_prompt)
        stream = self._stream
        self._stream = lambda epoch: _encoded(stream(epoch), encoder, encode_one, method)
        return self


def _source(meta: DatasetMeta) -> Stream:
    files, read = source_reader(meta)
    logger.info("%s: streaming %s", meta.dataset_id, ", ".join(files))
    # Refuse a slice that can't be streamed now, not at the first row.
    forward_slice(iter(()), meta)
    return lambda _: forward_slice(read(), meta)


def _stepped(items: Iterator[LocatedRow], step: Step) -> Iterator[LocatedRow]:
    for item in items:
        row = apply_step(step, item.row, item.where)
        if row is not None:
            yield item._replace(row=row)


def _encoded(
    items: Iterator[LocatedRow],
    encoder: Encoder,
    encode_one: Callable[[Encoder, Row], EncodedRow],
    method: str,
) -> Iterator[LocatedRow]:
    """The items with their features; at the end, warns about all of them."""
    read = left_out = untrained = 0
    first_untrained = ""
    for item in items:
        read += 1
        row, trained = apply_step(lambda row: encode_one(encoder, row), item.row, item.where)
        if row is None:
            left_out += 1
            continue
        if not trained:
            untrained += 1
            first_untrained = first_untrained or item.where
        yield item._replace(row=row)
    if read == 0:
        raise InvalidRequest(
            f"{method}: the stream is empty: its sources hold no rows, or what was called before {method} (filter, "
            "map, take, skip) left none"
        )
    check_left(read, left_out, encoder.template)
    check_trained(untrained, read - left_out, encoder, first_untrained)


def _shuffled(items: Iterator[LocatedRow], buffer_size: int, seeds: Sequence[int]) -> Iterator[LocatedRow]:
    # RandomState and not Generator: its streams never change from one numpy release to the next (NEP 19).
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(list(seeds))))
    buffer = list(islice(items, buffer_size))
    for item in items:
        at = random.randint(len(buffer))
        yield buffer[at]
        buffer[at] = item
    for at in random.permutation(len(buffer)):
        yield buffer[at]


def _require_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidRequest(f"{field}: {value}; allowed are whole numbers from {least}")
