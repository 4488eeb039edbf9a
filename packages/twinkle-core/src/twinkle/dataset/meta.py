"""The description of a data source."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from twinkle.protocol.errors import InvalidRequest


@dataclass(frozen=True)
class DatasetMeta:
    """One source of rows.

    Attributes:
        dataset_id: an id for `twinkle.hub.resolve`, a folder, or a single file. Files are JSONL, JSON (a list of
            objects), CSV or Parquet.
        subset: the folder, or part of the file name, of the files to read; default: all.
        split: "train", "validation", "test", or any other part of the file names; default: all files. If no file name
            contains a split, everything is "train".
        data_slice: rows to keep, after subset and split: a slice, or their numbers (`range(100)`); default: all.
        revision: branch, tag or commit on a hub; default: the default branch.
    """

    dataset_id: str
    subset: str | None = None
    split: str | None = None
    data_slice: slice | Sequence[int] | None = None
    revision: str | None = None


MetaLike: TypeAlias = DatasetMeta | str | os.PathLike[str]
"""A source of rows: a `DatasetMeta`, or just its id or path."""


def as_meta(value: object, field: str = "dataset_meta") -> DatasetMeta:
    """The value as a `DatasetMeta`.

    Raises:
        InvalidRequest: if it is not a source, string or path.
    """
    if isinstance(value, DatasetMeta):
        return value
    if isinstance(value, str | os.PathLike):
        return DatasetMeta(os.fspath(cast("str | os.PathLike[str]", value)))
    kind = type(value).__name__
    hint = "; rows that are in memory go to from_rows()" if isinstance(value, Mapping) else ""
    raise InvalidRequest(f"{field}: expected a DatasetMeta, or an id or a path, got {kind}{hint}")


def as_metas(value: MetaLike | Iterable[MetaLike]) -> list[DatasetMeta]:
    """One source, or several, as a list.

    Raises:
        InvalidRequest: naming the one that is not a source.
    """
    several = cast(object, value)
    if isinstance(several, str | Mapping) or not isinstance(several, Iterable):
        return [as_meta(cast(object, several))]
    metas = cast(Iterable[object], several)
    return [as_meta(each, f"dataset_meta[{index}]") for index, each in enumerate(metas)]
