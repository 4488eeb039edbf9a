"""Reads the rows of one file: JSONL, JSON, CSV, or Parquet, which needs pyarrow (twinkle-core[parquet])."""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from twinkle.protocol.errors import InvalidRequest

Row: TypeAlias = dict[str, Any]
Numbered: TypeAlias = tuple[int, Row]

# The beginning of an object in a list.
_OBJECT: Final = re.compile(r"[^\s,\]]")

# A CSV field may hold a whole document; the csv module's default limit is 128 KiB.
_LONGEST_CSV_FIELD: Final = 2**31 - 1


def read_rows(path: Path) -> Iterator[Numbered]:
    """The rows of a file, each with its line number (JSONL, CSV) or row number, from 1.

    Raises:
        InvalidRequest: naming file and line, if it can't be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InvalidRequest(
            f"{path}: can't read {path.suffix or 'such'} files; allowed are {', '.join(READERS)}"
        )
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 text: {error}") from error


def _read_json_lines(path: Path) -> Iterator[Numbered]:
    # Lines end only at \n: U+2028 and similar characters are common in JSON strings. Read as bytes, so that an
    # undecodable line still has a number.
    with path.open("rb") as file:
        for number, line in enumerate(_text_lines(file, path), start=1):
            if line.strip():
                yield number, _object(_parse(line, path, number), path, number)


def _read_json(path: Path) -> Iterator[Numbered]:
    """A list of objects; or JSON lines, as in many files with this suffix."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InvalidRequest(
                f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})"
            ) from error
        yield from _read_json_lines(path)
        return
    except (RecursionError, ValueError):
        if text.lstrip().startswith("["):
            _find_unreadable(text, path)
        yield from _read_json_lines(path)  # raises with the line number
        return
    if isinstance(value, dict) and len(text.strip().splitlines()) == 1:
        value = [cast(object, value)]
    if not isinstance(value, list):
        kind = _kind(cast(object, value))
        raise InvalidRequest(f"{path}: expected a list of objects, or one object a line, got one {kind}")
    for number, row in enumerate(cast(list[object], value), start=1):
        yield number, _object(row, path, number)


def _read_csv(path: Path) -> Iterator[Numbered]:
    """All values are strings; the first line names the columns."""
    before = csv.field_size_limit(_LONGEST_CSV_FIELD)
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, list[str]())
            for values in reader:
                number = reader.line_num + 1
                if not values:
                    continue
                if len(values) != len(header):
                    raise InvalidRequest(
                        f"{path}:{reader.line_num}: {len(values)} fields, and the first line has {len(header)}"
                    )
                yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InvalidRequest(f"{path}: not CSV (line {number}: {error})") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[Numbered]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InvalidRequest(
            f"{path}: Parquet files need pyarrow: pip install 'twinkle-core[parquet]'"
        ) from error
    number = 0
    # pyarrow's types are incomplete.
    broken = cast(type[Exception], cast(Any, pyarrow).ArrowException)
    try:
        with cast(Any, ParquetFile)(path) as file:
            for batch in file.iter_batches():
                for row in cast(list[Row], batch.to_pylist()):
                    number += 1
                    yield number, {column: without_filler(value) for column, value in row.items()}
    except (broken, OSError) as error:
        raise InvalidRequest(f"{path}: row {number + 1} can't be read as Parquet ({error})") from error


def without_filler(value: object) -> object:
    """A column's value as in JSON lines, without the nulls that Arrow adds to nested objects.

    Arrow gives every object of a column all fields that any of them has, so an absent field reads as null. Nulls in a
    list are kept: they hold a position.
    """
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {key: without_filler(item) for key, item in items if item is not None}
    if isinstance(value, list):
        return [without_filler(item) for item in cast("list[object]", value)]
    return value


READERS: Final[Mapping[str, Callable[[Path], Iterator[Numbered]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers by file suffix, in order of preference if a folder has the same file in several formats."""


def _parse(line: str, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise _unreadable(error, path, number) from error


def _find_unreadable(text: str, path: Path) -> None:
    """Raise for the first object of a list that Python can't read, with its line."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    while True:
        start = _OBJECT.search(text, position)
        if start is None:
            return
        number = text.count("\n", 0, start.start()) + 1
        try:
            _, position = decoder.raw_decode(text, start.start())
        except (RecursionError, ValueError) as error:
            raise _unreadable(error, path, number) from error


def _unreadable(error: Exception, path: Path, number: int) -> InvalidRequest:
    if isinstance(error, RecursionError):
        return InvalidRequest(f"{path}:{number}: objects and lists are nested too deeply to be read")
    # Python refuses integers of more than 4,300 digits.
    return InvalidRequest(f"{path}:{number}: a number can't be read ({error})")


def _text_lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{path} is not UTF-8 text: line {number}: {error}") from error


def _object(value: object, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}:{number}: expected an object, got {_kind(value)}")
    return cast(Row, value)


def _kind(value: object) -> str:
    names = {"dict": "object", "list": "list", "str": "text", "bool": "true or false", "NoneType": "null"}
    return names.get(type(value).__name__, "number")
