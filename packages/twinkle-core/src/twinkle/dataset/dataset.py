"""Rows in memory, and what is done to them on their way to a model: mapping, filtering, mixing, encoding."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, NoReturn, Self, cast

import numpy as np
from tqdm import tqdm

from twinkle import hub
from twinkle.data_format import NOT_TRAINED
from twinkle.dataset.files import DATA_FILES, find_files
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.readers import Row, read_rows
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import SequenceTooLong, Template, get_template_class

logger = logging.getLogger(__name__)

# Bars for what is done in a moment would only be noise.
_PROGRESS_DELAY_SECONDS = 1.0


class _Item(NamedTuple):
    """A row and where it came from."""

    row: Row
    file: str
    line: int


class _Source(NamedTuple):
    """The rows that came of one meta; `meta` is None once sources are mixed, and for rows made by hand."""

    meta: DatasetMeta | None
    items: list[_Item]


class Dataset:
    """Rows from one or several sources, kept in memory in the order of their sources.

    Methods that change the rows do so in place and return the dataset itself.

    Args:
        dataset_meta: the source, or several.

    Raises:
        NotFound: if a source, or the files asked for in it, can't be found.
        InvalidRequest: naming file and line, if a file can't be read.
    """

    def __init__(self, dataset_meta: DatasetMeta | Iterable[DatasetMeta] = ()) -> None:
        self._sources: list[_Source] = []
        self._template: Template | None = None
        for meta in [dataset_meta] if isinstance(dataset_meta, DatasetMeta) else dataset_meta:
            self.add_dataset(meta)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str = "rows") -> Self:
        """A dataset of rows that are already here; `name` stands for the file in messages."""
        dataset = cls()
        items = [_Item(dict(row), name, number) for number, row in enumerate(rows, start=1)]
        dataset._sources.append(_Source(None, items))
        return dataset

    def add_dataset(self, dataset_meta: DatasetMeta) -> Self:
        """Put another source's rows behind those that are here."""
        self._sources.append(_Source(dataset_meta, _load(dataset_meta)))
        return self

    def mix_dataset(self, interleave: bool = True) -> Self:
        """Make one source of all: a row of each in turn until all are used up, or one source after the other."""
        sources = [source.items for source in self._sources]
        if interleave:
            items = [item for group in zip_longest(*sources) for item in group if item is not None]
        else:
            items = [item for source in sources for item in source]
        self._sources = [_Source(None, items)]
        return self

    def set_template(self, template: str | Template, **options: Any) -> Self:
        """Choose what `encode` uses: a template, or the name of one with its arguments (`model_id=...`).

        Raises:
            InvalidRequest: if the name is unknown, or the arguments don't fit.
            NotFound: if the model can't be found.
        """
        if isinstance(template, Template):
            if options:
                raise InvalidRequest(
                    f"set_template: {', '.join(options)}: a finished template takes no arguments"
                )
            self._template = template
            return self
        template_class = get_template_class(template)
        try:
            inspect.signature(template_class).bind(**options)
        except TypeError as error:
            raise InvalidRequest(f"set_template({template!r}): {error}") from error
        self._template = template_class(**options)
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
        _require_function("map", processor)

        def apply(item: _Item) -> Row | None:
            result = cast(object, processor(dict(item.row)))
            if result is not None and not isinstance(result, Mapping):
                raise InvalidRequest(
                    f"{_name(processor)} must return a row or None, not {type(result).__name__}"
                )
            return None if result is None else dict(cast(Mapping[str, Any], result))

        return self._change(apply, f"Mapping ({_name(processor)})", dataset_meta)

    def filter(self, keep: Callable[[Row], object], dataset_meta: DatasetMeta | None = None) -> Self:
        """Leave out the rows for which `keep` is false.

        Args:
            dataset_meta: look at the rows of this source only.

        Raises:
            InvalidRequest: naming file and line, if `keep` fails.
        """
        _require_function("filter", keep)
        return self._change(
            lambda item: item.row if keep(item.row) else None, f"Filtering ({_name(keep)})", dataset_meta
        )

    def encode(self, add_generation_prompt: bool = False) -> Self:
        """Exchange each row's `messages` and `tools` for the `InputFeature` the template makes of them.

        Other columns stay with the row. With the template's strategy "delete", rows that are too long are left out.

        Args:
            add_generation_prompt: end each with the opening of an assistant's turn, to sample what follows.

        Raises:
            InvalidRequest: naming file and line, if a row is no conversation; or if no template was set.
        """
        template = self._template
        if template is None:
            raise InvalidRequest(
                "encode: no template; call dataset.set_template('Template', model_id=...) first"
            )
        untrained = 0

        def apply(item: _Item) -> Row | None:
            nonlocal untrained
            if "input_ids" in item.row and "messages" not in item.row:
                raise InvalidRequest("the row is encoded already; encode() is called once")
            try:
                feature = template.encode(item.row, add_generation_prompt)
            except SequenceTooLong:
                if template.truncation_strategy == "delete":
                    return None
                raise
            untrained += not np.any(feature["labels"] != NOT_TRAINED)
            others = {key: value for key, value in item.row.items() if key not in ("messages", "tools")}
            return {**others, **feature}

        before = len(self)
        self._change(apply, "Encoding", None)
        if len(self) < before:
            left_out = before - len(self)
            logger.warning("%d of %d rows left out: over %s tokens", left_out, before, template.max_length)
        if untrained and not add_generation_prompt:
            logger.warning("%d of %d rows have no token to train on", untrained, len(self))
        return self

    def __len__(self) -> int:
        return sum(len(source.items) for source in self._sources)

    def __getitem__(self, index: int) -> Row:
        position = index + len(self) if index < 0 else index
        if position >= 0:
            for source in self._sources:
                if position < len(source.items):
                    return source.items[position].row
                position -= len(source.items)
        raise IndexError(f"row {index} of {len(self)}")

    def __iter__(self) -> Iterator[Row]:
        return (item.row for source in self._sources for item in source.items)

    def _change(self, apply: Callable[[_Item], Row | None], title: str, meta: DatasetMeta | None) -> Self:
        """Exchange the rows of one source, or of all; all or nothing where a row fails."""
        if meta is not None and all(source.meta != meta for source in self._sources):
            raise InvalidRequest(
                f"dataset_meta: {meta} is none of the sources (which are one after mix_dataset)"
            )
        chosen = [meta is None or source.meta == meta for source in self._sources]
        total = sum(
            len(source.items) for source, is_chosen in zip(self._sources, chosen, strict=True) if is_chosen
        )
        with tqdm(total=total, desc=title, unit="row", delay=_PROGRESS_DELAY_SECONDS) as bar:
            self._sources = [
                source._replace(items=_changed(apply, source.items, bar)) if is_chosen else source
                for source, is_chosen in zip(self._sources, chosen, strict=True)
            ]
        return self


def _changed(apply: Callable[[_Item], Row | None], items: list[_Item], bar: "tqdm[NoReturn]") -> list[_Item]:
    changed: list[_Item] = []
    for item in items:
        row = _apply_to(apply, item)
        if row is not None:
            changed.append(item._replace(row=row))
        bar.update()
    return changed


def _apply_to(apply: Callable[[_Item], Row | None], item: _Item) -> Row | None:
    try:
        return apply(item)
    except InvalidRequest as error:
        raise InvalidRequest(f"{item.file}:{item.line}: {error.message}") from error
    except Exception as error:  # a user's function: whatever it raises, the row is what one has to know
        raise InvalidRequest(f"{item.file}:{item.line}: {type(error).__name__}: {error}") from error


def _load(meta: DatasetMeta) -> list[_Item]:
    root = hub.resolve(meta.dataset_id, "dataset", DATA_FILES, meta.revision)
    files = find_files(root, meta.subset, meta.split)
    logger.info("%s: reading %s", meta.dataset_id, ", ".join(str(file) for file in files))
    items: list[_Item] = []
    with tqdm(desc=f"Reading {meta.dataset_id}", unit="row", delay=_PROGRESS_DELAY_SECONDS) as bar:
        for file in files:
            name = str(file)
            for line, row in read_rows(file):
                items.append(_Item(row, name, line))
                bar.update()
    return _sliced(items, meta.data_slice)


def _sliced(items: list[_Item], data_slice: slice | Sequence[int] | None) -> list[_Item]:
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


def _require_function(method: str, function: object) -> None:
    if inspect.isclass(function):
        raise InvalidRequest(
            f"{method}: {function.__name__} is a class; give an instance: {function.__name__}(...)"
        )
    if not callable(function):
        raise InvalidRequest(f"{method}: expected a function of a row, got {type(function).__name__}")


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)
