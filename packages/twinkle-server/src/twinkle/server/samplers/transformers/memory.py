"""What the sampler's caches take of its part of the memory: counted before it is allocated, and never more."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

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

    # ---------------------------------------------------------------- tensors

    def zeros(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape, of the same dtype and device.

        Raises:
            CacheFull, torch.OutOfMemoryError: then nothing is counted.
        """
        size = math.prod(shape) * like.element_size()
        self.take(size)
        try:
            return like.new_zeros(shape)
        except Exception:
            self.give_back(size)
            raise

    def grown(self, old: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape in place of a smaller one, with its content, and zeros elsewhere; the old one, if it
        has that shape.
        """
        if shape == old.shape:
            return old
        new = self.zeros(old, shape)
        new[tuple(slice(0, size) for size in old.shape)] = old
        self.give_back(old.nbytes)
        return new

    def trimmed(self, old: Tensor, kept: Tensor) -> Tensor:
        """A copy of `kept`, a part of the old tensor, in its place."""
        new = self.zeros(old, tuple(kept.shape)).copy_(kept)
        self.give_back(old.nbytes)
        return new

    def free(self, tensors: Iterable[Tensor]) -> None:
        """They will be dropped."""
        for tensor in tensors:
            self.give_back(tensor.nbytes)
