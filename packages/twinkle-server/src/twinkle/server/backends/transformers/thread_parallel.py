"""Data parallelism over the threads of one process: on a CPU each network takes a share of a pass's rows.

Threads that split every matrix product (torch's intra-op parallelism) wait for one another at the end of each, and all
of them for one whose core is taken by another process. Networks with a share each wait once per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

# Each network holds its own gradients, and a micro-batch's activations.
MAX_NETWORKS = 4

Network = TypeVar("Network")
Share = TypeVar("Share")
Result = TypeVar("Result")


class ParallelNetworks(Generic[Network]):
    """Networks that compute at the same time: the first in the caller's thread, each other in its own."""

    def __init__(self, networks: Sequence[Network]) -> None:
        """At least one network; they share weights and nothing else."""
        self._networks = list(networks)
        self._pool = ThreadPoolExecutor(max(1, len(networks) - 1), "pass")

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def first(self) -> Network:
        return self._networks[0]

    def run(self, work: Callable[[Network, Share], Result], shares: Sequence[Share]) -> list[Result]:
        """Each share's result. Returns, or raises what one of them raised, once all have ended.

        Args:
            shares: at least one, at most as many as there are networks.
        """
        others = [
            self._pool.submit(work, network, share)
            for network, share in zip(self._networks[1:], shares[1:], strict=False)
        ]
        try:
            first = work(self._networks[0], shares[0])
        finally:
            wait(others)
        return [first, *(other.result() for other in others)]

    def close(self) -> None:
        self._pool.shutdown()
