"""A row and where it came from, and the steps that are done to one row: what all datasets share."""

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
"""What is done to a row; None leaves it out."""


class LocatedRow(NamedTuple):
    """A row and where it came from.

    Attributes:
        steps: what is still to be done to it when it is asked for.
        cut: whether encoding took tokens off it.
    """

    row: Row
    file: str
    line: int
    steps: tuple[Step, ...] = ()
    cut: bool = False

    @property
    def where(self) -> str:
        """The place, as messages name it."""
        return f"{self.file}:{self.line}"


def apply_step(step: Callable[[Row], Result], row: Row, where: str) -> Result:
    """What a step, or any function of a row, makes of a row.

    Raises:
        InvalidRequest: naming the place, whatever the step raised.
    """
    try:
        return step(row)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}") from error
    except Exception as error:  # a user's function: whatever it raises, the row is what one has to know
        raise InvalidRequest(f"{where}: {type(error).__name__}: {error}") from error


def mapping(processor: Callable[[Row], Mapping[str, Any] | None]) -> Step:
    """The step that exchanges a row for what `processor` makes of a copy of it.

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
    """The step that leaves a row out where `keep` is false.

    Raises:
        InvalidRequest: if it is no function of a row.
    """
    _require_function("filter", keep)
    return lambda row: row if _called(keep, row, row) else None


def find_template(template: str | Template, options: Mapping[str, Any]) -> Template:
    """A template as `set_template` is given it: finished, or by name with its arguments.

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
    """The template, which has to be set before `method` is called."""
    if template is None:
        raise InvalidRequest(
            f"{method}: no template; call dataset.set_template('Template', model_id=...) first"
        )
    return template


def made_by_hand(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[LocatedRow]:
    """Items of rows that are in no file; `name` stands for it in messages.

    Rows of a dataset of Hugging Face's library are read from Arrow, as those of a Parquet file are.

    Raises:
        InvalidRequest: while they are read, naming the row's number, if one is no object with columns.
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
    """The files of a source, fetched if need be, and what reads their rows one by one, `data_slice` left aside.

    Raises:
        NotFound: if the source, or the files asked for in it, can't be found.
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
    """The rows of a source's `data_slice`, read no further than the last of them.

    Raises:
        InvalidRequest: if it counts from the end or goes back, which takes all rows in memory.
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
    """What a user's function makes of `given`, a copy of `row` or the row itself."""
    try:
        return function(given)
    except InvalidRequest:
        raise
    except Exception as error:  # whatever it raises, the function and the row are what one has to know
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
    """What a function, or a preprocessor, is called in messages."""
    return getattr(function, "__name__", type(function).__name__)
