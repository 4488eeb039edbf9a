"""Rows of data from files and hubs, mapped to conversations and encoded to tokens.

`meta` says what data to read, `data_files` finds the files that hold it, `readers` reads one file. There are three
datasets: `dataset` processes rows at once, `lazy` on access, `iterable` while it reads files. The first two share
`sources`; all share `rows` (the steps applied to one row), `mixing` and `encoding`, which `parallel` and `cache` speed
up. `packing` and `description` work on encoded rows. `twinkle.dataloader` makes batches.
"""

from twinkle.dataset.dataset import Dataset
from twinkle.dataset.description import Description
from twinkle.dataset.iterable import IterableDataset
from twinkle.dataset.lazy import LazyDataset
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.readers import Row

__all__ = ["Dataset", "DatasetMeta", "Description", "IterableDataset", "LazyDataset", "Row"]
