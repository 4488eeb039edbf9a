"""Batches of a dataset's or a stream's rows, shuffled and resumable.

Independent of what rows are and of what batches are used for.
"""

from twinkle.dataloader.loader import DataLoader, DataLoaderState

__all__ = ["DataLoader", "DataLoaderState"]
