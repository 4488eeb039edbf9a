"""Rows of one or several sources in memory: what datasets with a length share."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Self

from tqdm import tqdm

from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.mixing import Stop, check_mixing, mix
from twinkle.dataset.readers import Row
from twinkle.dataset.rows import (
    Item,
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


class Source(NamedTuple):
    """The rows that came of one meta; `meta` is None once sources are mixed, and for rows made by hand."""

    meta: DatasetMeta | None
    items: list[Item]


class Sources:
    """The part of `Dataset` and `LazyDataset` that is the same in both; not for use by itself.

    Methods that change the rows do so in place and return the dataset itself.
    """

    def __init__(self, dataset_meta: DatasetMeta | Iterable[DatasetMeta] = ()) -> None:
        self._sources: list[Source] = []
        self._template: Template | None = None
        # What left no row where there were some, for the message of whoever needs some.
        self._emptied_by: str | None = None
        for meta in [dataset_meta] if isinstance(dataset_meta, DatasetMeta) else dataset_meta:
            self.add_dataset(meta)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str = "rows") -> Self:
        """A dataset of rows that are already here; `name` stands for the file in messages."""
        dataset = cls()
        dataset._sources.append(Source(None, list(made_by_hand(rows, name))))
        return dataset

    def add_dataset(self, dataset_meta: DatasetMeta) -> Self:
        """Put another source's rows behind those that are here."""
        self._sources.append(Source(dataset_meta, _load(dataset_meta)))
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
        self._replace([Source(None, items)], "mix_dataset")
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
        dataset_meta: DatasetMeta | None = None,
    ) -> Self:
        """Exchange each row for what `processor` makes of it; rows it returns None for are left out.

        Args:
            processor: a preprocessor, or any function of a row.
            dataset_meta: change the rows of this source only.

        Raises:
            InvalidRequest: naming file and line, if the processor fails or returns something else.
        """
        return self._change(mapping(processor), f"Mapping ({name_of(processor)})", dataset_meta)

    def filter(self, keep: Callable[[Row], object], dataset_meta: DatasetMeta | None = None) -> Self:
        """Leave out the rows for which `keep` is false.

        Args:
            keep: any function of a row.
            dataset_meta: look at the rows of this source only.

        Raises:
            InvalidRequest: naming file and line, if `keep` fails.
        """
        return self._select(filtering(keep), f"Filtering ({name_of(keep)})", dataset_meta)

    def __len__(self) -> int:
        return sum(len(source.items) for source in self._sources)

    def __getitem__(self, index: int) -> Row:
        position = index + len(self) if index < 0 else index
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

    def _row(self, item: Item) -> Row:
        """The row of an item, as it is given out."""
        return item.row

    def _items(self) -> Iterator[Item]:
        return (item for source in self._sources for item in source.items)

    def _apply(self, change: Callable[[Item], Item | None], title: str, meta: DatasetMeta | None) -> None:
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

    def _replace(self, sources: list[Source], by: str) -> None:
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


def finished(item: Item, step: Step) -> Item | None:
    """The item with what a step makes of its row; None if that is None."""
    row = apply_step(step, item.row, item.where)
    return None if row is None else item._replace(row=row)


def _changed(change: Callable[[Item], Item | None], items: list[Item], bar: "tqdm[NoReturn]") -> list[Item]:
    changed: list[Item] = []
    for item in items:
        new = change(item)
        if new is not None:
            changed.append(new)
        bar.update()
    return changed


def _load(meta: DatasetMeta) -> list[Item]:
    files, read = source_reader(meta)
    logger.info("%s: reading %s", meta.dataset_id, ", ".join(files))
    items: list[Item] = []
    with progress(f"Reading {meta.dataset_id}") as bar:
        for item in read():
            items.append(item)
            bar.update()
    return _sliced(items, meta.data_slice)


def _sliced(items: list[Item], data_slice: slice | Sequence[int] | None) -> list[Item]:
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
