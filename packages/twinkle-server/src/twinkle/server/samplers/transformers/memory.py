"""Bytes that the sampler's caches take of its part of the memory: counted before they are allocated, and never more."""

from __future__ import annotations

from twinkle.server.samplers.cache_usage import UNBOUNDED


class CacheFull(MemoryError):
    """There is no room for what a cache needs: others must give some up first. Nothing has been allocated."""


class CacheMemory:
    """One count for all caches of a batch. Used by the thread that computes."""

    def __init__(self, limit: int = UNBOUNDED) -> None:
        """
        Args:
            limit: bytes.
        """
        self._limit = limit
        self._taken = 0

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def left(self) -> int:
        return self._limit - self._taken

    def take(self, size: int) -> None:
        """
        Raises:
            CacheFull: if there is not that much left.
        """
        if size > self.left:
            raise CacheFull(
                f"the sampler's caches have {self._taken} of {self._limit} bytes, and want {size} more"
            )
        self._taken += size

    def give_back(self, size: int) -> None:
        self._taken -= size
