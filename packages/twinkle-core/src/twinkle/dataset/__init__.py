"""Rows of data from files and hubs, mapped to conversations and encoded to tokens.

`meta` says what is wanted, `data_files` finds which files hold it, `readers` reads one file. Three datasets work on the
rows: `dataset` at once, `lazy` when a row is asked for, `iterable` while files are read; the first two share `sources`,
all three `rows` (what is done to one row), `mixing` and `encoding`, which `parallel` and `cache` make quicker with the
help of `templates`. `packing` and `description` are for encoded rows. Batches are made by `twinkle.dataloader`.
"""

from twinkle.dataset.dataset import Dataset
from twinkle.dataset.description import Description
from twinkle.dataset.iterable import IterableDataset
from twinkle.dataset.lazy import LazyDataset
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.readers import Row

__all__ = ["Dataset", "DatasetMeta", "Description", "IterableDataset", "LazyDataset", "Row"]
