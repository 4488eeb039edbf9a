"""Batches of a dataset's or a stream's rows, shuffled and resumable.

What a row is, and what is done with a batch, is not known here.
"""

from twinkle.dataloader.loader import DataLoader, DataLoaderState

__all__ = ["DataLoader", "DataLoaderState"]
