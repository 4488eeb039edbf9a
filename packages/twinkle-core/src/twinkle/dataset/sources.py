"""Rows of one or several sources in memory: what datasets with a length share."""

import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from numbers import Real
from typing import Any, NamedTuple, NoReturn, Self, SupportsIndex, overload

import numpy as np
from tqdm import tqdm

from twinkle.dataset.meta import DatasetMeta, MetaLike, as_meta, as_metas
from twinkle.dataset.mixing import Stop, check_mixing, mix
from twinkle.dataset.readers import Row
from twinkle.dataset.rows import (
    LocatedRow,
    Step,
    apply_step,
    filtering,
    find_template,
    made_by_hand,
    mapping,
    name_of,
    source_reader,
)
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

logger = logging.getLogger(__name__)

# Bars for what is done in a moment would only be noise.
PROGRESS_DELAY_SECONDS = 1.0


class DataSource(NamedTuple):
    """The rows that came of one meta; `meta` is None once sources are mixed, and for rows made by hand."""

    meta: DatasetMeta | None
    items: list[LocatedRow]


class Sources:
    """The part of `Dataset` and `LazyDataset` that is the same in both; not for use by itself.

    Methods that change the rows do so in place and return the dataset itself.
    """

    def __init__(self, dataset_meta: MetaLike | Iterable[MetaLike] = ()) -> None:
        self._sources: list[DataSource] = []
        self._template: Template | None = None
        # What left no row where there were some, for the message of whoever needs some.
        self._emptied_by: str | None = None
        for meta in as_metas(dataset_meta):
            self.add_dataset(meta)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str = "rows") -> Self:
        """A dataset of rows that are already here; `name` stands for the file in messages.

        Raises:
            InvalidRequest: naming the row's number, if one is no object with columns.
        """
        dataset = cls()
        dataset._sources.append(DataSource(None, list(made_by_hand(rows, name))))
        return dataset

    def add_dataset(self, dataset_meta: MetaLike) -> Self:
        """Put another source's rows behind those that are here; text or a path is an id, as in `DatasetMeta(id)`.

        Raises:
            NotFound: if the source, or the files asked for in it, can't be found.
            InvalidRequest: naming file and line, if a file can't be read; or if it is no source.
        """
        meta = as_meta(dataset_meta)
        self._sources.append(DataSource(meta, _load(meta)))
        return self

    def mix_dataset(
        self,
        interleave: bool = True,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        stop: Stop = "all_exhausted",
    ) -> Self:
        """Make one source of all: a row of each in turn, or drawn by weights, or one source after the other.

        No row comes twice, and the rows of each source stay in their order.

        Args:
            interleave: whether to take the sources' rows by turns; False puts one source after the other.
            weights: how often each source is drawn from, one number a source, in proportion; None goes in turn. A
                source of weight 0 is left out.
            seed: of the drawing, from 0; the same order on every machine and with every numpy.
            stop: "all_exhausted" goes on with the sources that have rows left; "first_exhausted" ends when the turn
                comes to a source that has none.

        Raises:
            InvalidRequest: if the weights are not one a source, not numbers from 0, or all 0; or if another argument is
                out of its range.
        """
        check_mixing(weights, len(self._sources), seed, stop)
        if not interleave and (weights is not None or stop != "all_exhausted"):
            raise InvalidRequest(
                "interleave=False puts all rows one after the other: give neither weights nor stop"
            )
        if interleave:
            items = list(mix([iter(source.items) for source in self._sources], weights, [seed], stop))
        else:
            items = [item for source in self._sources for item in source.items]
        self._replace([DataSource(None, items)], "mix_dataset")
        return self

    def set_template(self, template: str | Template, **options: Any) -> Self:
        """Choose what `encode` uses: a template, or the name of one with its arguments (`model_id=...`).

        Raises:
            InvalidRequest: if the name is unknown, or the arguments don't fit.
            NotFound: if the model can't be found.
        """
        self._template = find_template(template, options)
        return self

    def map(
        self,
        processor: Callable[[Row], Mapping[str, Any] | None],
        dataset_meta: MetaLike | None = None,
    ) -> Self:
        """Exchange each row for what `processor` makes of it; rows it returns None for are left out.

        Args:
            processor: a preprocessor, or any function of a row.
            dataset_meta: change the rows of this source only.

        Raises:
            InvalidRequest: naming file and line, if the processor fails or returns something else.
        """
        return self._change(mapping(processor), f"Mapping ({name_of(processor)})", _chosen(dataset_meta))

    def filter(self, keep: Callable[[Row], object], dataset_meta: MetaLike | None = None) -> Self:
        """Leave out the rows for which `keep` is false.

        Args:
            keep: any function of a row.
            dataset_meta: look at the rows of this source only.

        Raises:
            InvalidRequest: naming file and line, if `keep` fails.
        """
        return self._select(filtering(keep), f"Filtering ({name_of(keep)})", _chosen(dataset_meta))

    def split(self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """Two datasets of these rows in a random order, one to train on and one held out; this one stays as it is.

        Both keep the template, and their rows the file and line they came from. Several sources become one. It may be
        called before or after `encode`.

        Args:
            fraction: share of the rows to hold out, between 0 and 1; rounded to whole rows.
            seed: of the order, from 0; the same split on every machine and with every numpy.

        Returns:
            What remains, and what is held out.

        Raises:
            InvalidRequest: if a number is out of its range, there are no rows, or one of the two would have none.
        """
        if not isinstance(fraction, Real) or not 0 < fraction < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"fraction: {fraction!r}; allowed are numbers between 0 and 1, such as 0.1 to hold out a tenth"
            )
        if seed < 0:
            raise InvalidRequest(f"seed: {seed}; allowed are whole numbers from 0")
        self._require_rows("split")
        items = list(self._items())
        held_out = round(len(items) * float(fraction))
        if held_out in (0, len(items)):
            raise InvalidRequest(
                f"split: {fraction} of {len(items)} rows is {held_out} rows to hold out, and each part needs at least "
                "one; give another fraction, or more rows"
            )
        # RandomState and not Generator: its streams never change from one numpy release to the next (NEP 19).
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed])))
        order = [items[int(number)] for number in random.permutation(len(items))]
        return self._part(order[held_out:]), self._part(order[:held_out])

    def __len__(self) -> int:
        return sum(len(source.items) for source in self._sources)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Row: ...

    @overload
    def __getitem__(self, index: slice, /) -> list[Row]: ...

    def __getitem__(self, index: SupportsIndex | slice, /) -> Row | list[Row]:
        """A row by its number, counted from the end where that is negative; or a list of them by a slice.

        Raises:
            IndexError: if there is no such row.
            TypeError: for anything else.
        """
        if isinstance(index, slice):
            return [self._row(item) for item in list(self._items())[index]]
        if not isinstance(index, SupportsIndex):  # pyright: ignore[reportUnnecessaryIsInstance]
            hint = f"; a column is [row[{index!r}] for row in dataset]" if isinstance(index, str) else ""
            raise TypeError(
                f"rows are taken by a whole number or a slice, not by {type(index).__name__}{hint}"
            )
        position = operator.index(index)
        position += len(self) if position < 0 else 0
        if position >= 0:
            for source in self._sources:
                if position < len(source.items):
                    return self._row(source.items[position])
                position -= len(source.items)
        raise IndexError(f"row {index} of {len(self)}")

    def __iter__(self) -> Iterator[Row]:
        return (self._row(item) for item in self._items())

    def _change(self, step: Step, title: str, meta: DatasetMeta | None) -> Self:
        """Do a step to the rows of one source, or of all; all or nothing where a row fails."""
        raise NotImplementedError

    def _select(self, step: Step, title: str, meta: DatasetMeta | None) -> Self:
        """Leave out the rows that a step makes None of."""
        return self._change(step, title, meta)

    def _row(self, item: LocatedRow) -> Row:
        """The row of an item, as it is given out."""
        return item.row

    def _part(self, items: list[LocatedRow]) -> Self:
        """A dataset like this one that holds only these of its items."""
        part = copy(self)
        part._sources = [DataSource(self._sources[0].meta if len(self._sources) == 1 else None, items)]
        return part

    def _items(self) -> Iterator[LocatedRow]:
        return (item for source in self._sources for item in source.items)

    def _apply(
        self, change: Callable[[LocatedRow], LocatedRow | None], title: str, meta: DatasetMeta | None
    ) -> None:
        """Exchange the items of one source, or of all, those it gives None for left out; all or nothing."""
        if meta is not None and all(source.meta != meta for source in self._sources):
            raise InvalidRequest(
                f"dataset_meta: {meta} is none of the sources (which are one after mix_dataset)"
            )
        chosen = [meta is None or source.meta == meta for source in self._sources]
        total = sum(
            len(source.items) for source, is_chosen in zip(self._sources, chosen, strict=True) if is_chosen
        )
        with progress(title, total) as bar:
            changed = [
                source._replace(items=_changed(change, source.items, bar)) if is_chosen else source
                for source, is_chosen in zip(self._sources, chosen, strict=True)
            ]
        self._replace(changed, title)

    def _replace(self, sources: list[DataSource], by: str) -> None:
        before = len(self)
        self._sources = sources
        if before and not len(self):
            self._emptied_by = f"{by} left none of {before} rows"

    def _require_rows(self, method: str) -> None:
        if len(self):
            return
        metas = [source.meta.dataset_id for source in self._sources if source.meta is not None]
        reason = self._emptied_by or (
            f"{', '.join(metas)}: no rows in it (data_slice, split and subset choose some)"
            if metas
            else "no rows were given to it"
        )
        raise InvalidRequest(f"{method}: the dataset is empty: {reason}")


def progress(title: str, total: int | None = None) -> "tqdm[NoReturn]":
    """A bar that counts rows, and shows only if it takes a while."""
    return tqdm(total=total, desc=title, unit="row", delay=PROGRESS_DELAY_SECONDS)


def finished(item: LocatedRow, step: Step) -> LocatedRow | None:
    """The item with what a step makes of its row; None if that is None."""
    row = apply_step(step, item.row, item.where)
    return None if row is None else item._replace(row=row)


def _chosen(meta: MetaLike | None) -> DatasetMeta | None:
    return None if meta is None else as_meta(meta)


def _changed(
    change: Callable[[LocatedRow], LocatedRow | None], items: list[LocatedRow], bar: "tqdm[NoReturn]"
) -> list[LocatedRow]:
    changed: list[LocatedRow] = []
    for item in items:
        new = change(item)
        if new is not None:
            changed.append(new)
        bar.update()
    return changed


def _load(meta: DatasetMeta) -> list[LocatedRow]:
    files, read = source_reader(meta)
    logger.info("%s: reading %s", meta.dataset_id, ", ".join(files))
    items: list[LocatedRow] = []
    with progress(f"Reading {meta.dataset_id}") as bar:
        for item in read():
            items.append(item)
            bar.update()
    return _sliced(items, meta.data_slice)


def _sliced(items: list[LocatedRow], data_slice: slice | Sequence[int] | None) -> list[LocatedRow]:
    if data_slice is None:
        return items
    if isinstance(data_slice, slice):
        return items[data_slice]
    for number in data_slice:
        if not -len(items) <= number < len(items):
            raise InvalidRequest(
                f"data_slice: row {number} of {len(items)}; a slice, such as slice(0, 1000), takes what there is"
            )
    return [items[number] for number in data_slice]
