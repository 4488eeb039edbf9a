"""Rows of one or several sources in memory: the base of datasets with a length."""

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

# A bar that appears for a moment would only be noise.
PROGRESS_DELAY_SECONDS = 1.0


class DataSource(NamedTuple):
    """The rows of one source; `meta` is None for mixed sources and rows from memory."""

    meta: DatasetMeta | None
    items: list[LocatedRow]


class Sources:
    """The common base of `Dataset` and `LazyDataset`; not for use by itself.

    Methods that change the rows do so in place and return the dataset itself.
    """

    def __init__(self, dataset_meta: MetaLike | Iterable[MetaLike] = ()) -> None:
        self._sources: list[DataSource] = []
        self._template: Template | None = None
        # The method that dropped the last row, for error messages about missing rows.
        self._emptied_by: str | None = None
        for meta in as_metas(dataset_meta):
            self.add_dataset(meta)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str = "rows") -> Self:
        """A dataset of rows in memory; `name` stands for the file in error messages.

        Raises:
            InvalidRequest: naming the row's number, if one is not an object with columns.
        """
        dataset = cls()
        dataset._sources.append(DataSource(None, list(made_by_hand(rows, name))))
        return dataset

    def add_dataset(self, dataset_meta: MetaLike) -> Self:
        """Append another source's rows; a string or path means `DatasetMeta(id)`.

        Raises:
            NotFound: if the source, or the requested files in it, can't be found.
            InvalidRequest: naming file and line, if a file can't be read; or if the argument is not a source.
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
        """Merge all sources into one: a row of each in turn, or at random by weights, or one source after the other.

        Each row is used once, and the rows of each source keep their order.

        Args:
            interleave: whether to alternate between sources; False concatenates them.
            weights: relative frequency of each source; default: one row of each in turn. A source of weight 0 is
                dropped.
            seed: of the random choice, from 0; the order is the same on every machine and numpy version.
            stop: "all_exhausted" continues with the sources that have rows left; "first_exhausted" stops at the first
                that has none.

        Raises:
            InvalidRequest: if the weights are not one per source, not numbers from 0, or all 0; or if another argument
                is out of range.
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
        """Set the template for `encode`: an instance, or a name with arguments (`model_id=...`).

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
        """Replace each row by what `processor` returns for it; None drops the row.

        Args:
            processor: a preprocessor, or any function of a row.
            dataset_meta: apply it only to this source.

        Raises:
            InvalidRequest: naming file and line, if the processor fails or returns anything else.
        """
        return self._change(mapping(processor), f"Mapping ({name_of(processor)})", _chosen(dataset_meta))

    def filter(self, keep: Callable[[Row], object], dataset_meta: MetaLike | None = None) -> Self:
        """Drop the rows for which `keep` is false.

        Args:
            keep: any function of a row.
            dataset_meta: apply it only to this source.

        Raises:
            InvalidRequest: naming file and line, if `keep` fails.
        """
        return self._select(filtering(keep), f"Filtering ({name_of(keep)})", _chosen(dataset_meta))

    def split(self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """Two datasets of these rows in a random order, one to train on and one held out; this one is unchanged.

        Both keep the template, and the rows their origin (file and line). Several sources become one. Can be called
        before or after `encode`.

        Args:
            fraction: share of rows to hold out, between 0 and 1; rounded to whole rows.
            seed: of the order, from 0; the split is the same on every machine and numpy version.

        Returns:
            The remaining rows, and those held out.

        Raises:
            InvalidRequest: if a number is out of range, there are no rows, or one of the two would be empty.
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
        # RandomState, not Generator: its streams are frozen across numpy releases (NEP 19).
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
        """A row by its number, or a list of rows by a slice; negative numbers count from the end.

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
        """Apply a step to the rows of one source, or of all; if a row fails, nothing changes."""
        raise NotImplementedError

    def _select(self, step: Step, title: str, meta: DatasetMeta | None) -> Self:
        """Drop the rows for which a step returns None."""
        return self._change(step, title, meta)

    def _row(self, item: LocatedRow) -> Row:
        return item.row

    def _part(self, items: list[LocatedRow]) -> Self:
        part = copy(self)
        part._sources = [DataSource(self._sources[0].meta if len(self._sources) == 1 else None, items)]
        return part

    def _items(self) -> Iterator[LocatedRow]:
        return (item for source in self._sources for item in source.items)

    def _apply(
        self, change: Callable[[LocatedRow], LocatedRow | None], title: str, meta: DatasetMeta | None
    ) -> None:
        """Replace the items of one source, or of all; None drops an item. If one fails, nothing changes."""
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
    """A progress bar over rows, which appears only if it takes a while."""
    return tqdm(total=total, desc=title, unit="row", delay=PROGRESS_DELAY_SECONDS)


def finished(item: LocatedRow, step: Step) -> LocatedRow | None:
    """The item with the step applied to its row; None if that drops it."""
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
