"""Rows of data from files and hubs, mapped to conversations and encoded to tokens.

`meta` says what is wanted, `files` finds which files hold it, `readers` reads one file, `dataset` keeps the
rows and works on them. Batches are made by `twinkle.dataloader`.
"""

from twinkle.dataset.dataset import Dataset
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.readers import Row

__all__ = ["Dataset", "DatasetMeta", "Row"]
