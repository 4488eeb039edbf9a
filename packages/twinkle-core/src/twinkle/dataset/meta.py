"""Which data is wanted, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetMeta:
    """One source of rows.

    Attributes:
        dataset_id: an id that `twinkle.hub.resolve` knows, a folder, or a single file. Files are JSONL, JSON
            (a list of objects), CSV or Parquet.
        subset: the folder, or part of the file name, of the files to read; None is all.
        split: "train", "validation", "test", or whatever else is part of the file names; None is all files.
            Where no file name tells of any split, everything is "train".
        data_slice: which of the rows, after subset and split: a slice, or their numbers (`range(100)`); None
            is all.
        revision: branch, tag or commit on a hub; None is the default branch.
    """

    dataset_id: str
    subset: str | None = None
    split: str | None = None
    data_slice: slice | Sequence[int] | None = None
    revision: str | None = None
