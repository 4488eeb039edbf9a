"""Rows with their origin, and the steps applied to a row: shared by all datasets."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from twinkle import hub
from twinkle.dataset.data_files import DATA_FILES, find_files
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.readers import Row, read_rows, without_filler
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template, get_template_class

Result = TypeVar("Result")

Step: TypeAlias = Callable[[Row], Row | None]
"""A change to a row; None drops it."""


class LocatedRow(NamedTuple):
    """A row and its origin.

    Attributes:
        steps: still to be applied on access.
        cut: whether encoding truncated it.
    """

    row: Row
    file: str
    line: int
    steps: tuple[Step, ...] = ()
    cut: bool = False

    @property
    def where(self) -> str:
        """The origin, for error messages."""
        return f"{self.file}:{self.line}"


def apply_step(step: Callable[[Row], Result], row: Row, where: str) -> Result:
    """Apply a step, or any function, to a row.

    Raises:
        InvalidRequest: naming the place, whatever exception the step raised.
    """
    try:
        return step(row)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}") from error
    except (
        Exception
    ) as error:  # a user's function may raise anything, and the user needs to know for which row
        raise InvalidRequest(f"{where}: {type(error).__name__}: {error}") from error


def mapping(processor: Callable[[Row], Mapping[str, Any] | None]) -> Step:
    """The step that replaces a row by what `processor` returns for a copy of it.

    Raises:
        InvalidRequest: if it is no function of a row.
    """
    _require_function("map", processor)

    def step(row: Row) -> Row | None:
        result = cast(object, _called(processor, dict(row), row))
        if result is not None and not isinstance(result, Mapping):
            raise InvalidRequest(
                f"{name_of(processor)} must return a row or None, not {type(result).__name__}"
            )
        return None if result is None else dict(cast(Mapping[str, Any], result))

    return step


def filtering(keep: Callable[[Row], object]) -> Step:
    """The step that drops a row if `keep` is false.

    Raises:
        InvalidRequest: if it is no function of a row.
    """
    _require_function("filter", keep)
    return lambda row: row if _called(keep, row, row) else None


def find_template(template: str | Template, options: Mapping[str, Any]) -> Template:
    """The template for `set_template`'s arguments: an instance, or a name with options.

    Raises:
        InvalidRequest: if the name is unknown, or the arguments don't fit.
        NotFound: if the model can't be found.
    """
    if isinstance(template, Template):
        if options:
            raise InvalidRequest(
                f"set_template: {', '.join(options)}: a finished template takes no arguments"
            )
        return template
    template_class = get_template_class(template)
    try:
        inspect.signature(template_class).bind(**options)
    except TypeError as error:
        raise InvalidRequest(f"set_template({template!r}): {error}") from error
    return template_class(**options)


def require_template(template: Template | None, method: str) -> Template:
    """Return the template, which must be set before `method` is called."""
    if template is None:
        raise InvalidRequest(
            f"{method}: no template; call dataset.set_template('Template', model_id=...) first"
        )
    return template


def made_by_hand(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[LocatedRow]:
    """Located rows for rows from memory; `name` stands for the file in error messages.

    Rows of a Hugging Face dataset come from Arrow, like those of a Parquet file.

    Raises:
        InvalidRequest: while they are read, naming the row's number, if one is not an object with columns.
    """
    is_arrow = type(rows).__module__.partition(".")[0] == "datasets"
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"{name}:{number}: expected a row, an object with columns such as {{'messages': [...]}}, got "
                f"{type(row).__name__}"
            )
        yield LocatedRow(
            {column: without_filler(value) for column, value in row.items()} if is_arrow else dict(row),
            name,
            number,
        )


def source_reader(meta: DatasetMeta) -> tuple[list[str], Callable[[], Iterator[LocatedRow]]]:
    """A source's files, downloaded if needed, and a function that yields their rows, ignoring `data_slice`.

    Raises:
        NotFound: if the source, or the requested files in it, can't be found.
    """
    root = hub.resolve(meta.dataset_id, "dataset", DATA_FILES, meta.revision)
    files = find_files(root, meta.subset, meta.split)

    def read() -> Iterator[LocatedRow]:
        for file in files:
            name = str(file)
            for line, row in read_rows(file):
                yield LocatedRow(row, name, line)

    return [str(file) for file in files], read


def forward_slice(items: Iterator[LocatedRow], meta: DatasetMeta) -> Iterator[LocatedRow]:
    """The rows of a source's `data_slice`, reading no further than the last of them.

    Raises:
        InvalidRequest: if it counts from the end or goes backwards, which would need all rows in memory.
    """
    chosen = meta.data_slice
    if chosen is None:
        return items
    if isinstance(chosen, slice):
        if any(number is not None and number < 0 for number in (chosen.start, chosen.stop, chosen.step)):
            raise _not_forward(meta)
        return islice(items, chosen.start, chosen.stop, chosen.step)
    numbers = list(chosen)
    if any(number < 0 for number in numbers) or any(
        earlier >= later for earlier, later in zip(numbers, numbers[1:], strict=False)
    ):
        raise _not_forward(meta)
    return _numbered(items, numbers)


def _numbered(items: Iterator[LocatedRow], numbers: list[int]) -> Iterator[LocatedRow]:
    read = 0
    for number in numbers:
        item = next(islice(items, number - read, None), None)
        if item is None:
            raise InvalidRequest(
                f"data_slice: there is no row {number}; a slice, such as slice(0, 1000), takes what there is"
            )
        read = number + 1
        yield item


def _not_forward(meta: DatasetMeta) -> InvalidRequest:
    return InvalidRequest(
        f"data_slice: {meta.data_slice}; rows that are streamed can be taken in their order only, counted from the "
        "beginning (Dataset takes them in any)"
    )


def _called(function: Callable[[Row], Result], given: Row, row: Row) -> Result:
    """Call a user's function with `given`, which is `row` or a copy of it."""
    try:
        return function(given)
    except InvalidRequest:
        raise
    except Exception as error:  # it may raise anything, and the user needs to know the function and the row
        columns = ", ".join(map(str, row)) or "none"
        raise InvalidRequest(
            f"{name_of(function)} raised {type(error).__name__}: {error}; the columns are {columns}"
        ) from error


def _require_function(method: str, function: object) -> None:
    if inspect.isclass(function):
        raise InvalidRequest(
            f"{method}: {function.__name__} is a class; give an instance: {function.__name__}(...)"
        )
    if not callable(function):
        raise InvalidRequest(f"{method}: expected a function of a row, got {type(function).__name__}")


def name_of(function: object) -> str:
    """The name of a function, or of a preprocessor's class, for error messages."""
    return getattr(function, "__name__", type(function).__name__)
