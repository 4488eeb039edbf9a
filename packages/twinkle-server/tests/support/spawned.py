"""What tests run in processes of their own, which can import this and not the tests."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.store.database import Database


def make_and_read(url: str, barrier, found) -> None:
    barrier.wait()
    database = Database(url)
    found.put(database.secret("tokens", multiprocessing.current_process().name))
    database.close()


def sum_of_ranks(rank: int, rendezvous: str, directory: str) -> None:
    """Writes the sum of 1 and 2, which two ranks have, into a file for each rank."""
    import torch
    import torch.distributed as dist

    from twinkle.server.backends.meeting import meet

    config = ModelConfig(Path("fake"), data_parallel_size=2, rank=rank, rendezvous=rendezvous)
    meet(config, "gloo", timedelta(seconds=60))
    number = torch.tensor([rank + 1.0])
    dist.all_reduce(number)
    (Path(directory) / str(rank)).write_text(str(number.item()), encoding="utf-8")
    dist.destroy_process_group()
