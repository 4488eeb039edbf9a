"""The one account of a device's memory: what its weights leave is divided once, and nobody takes another's part.

weights    first: they are there when the rest is divided
spare      kept back, for what nobody counts: kernels' workspaces, the allocator's rounding, other programs
adapters   the trainer's banks: weights, moments, gradients
passes     a training pass: gradients and copies of the adapters that take part, then activations
sampling   the sampler's adapters, and its cache
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from twinkle.server.backends.protocol import ModelConfig

T = TypeVar("T")

# Of what is free beside the weights. A CPU's memory belongs to other programs too, and what they leave changes.
_SPARE_GPU = 0.08
_SPARE_CPU = 0.25
# Parts of the rest, where a model is trained and sampled; if only one is done, the other's part is the first one's.
_ADAPTERS, _PASSES, _SAMPLING = 0.25, 0.45, 0.3


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes; together no more than was free."""

    adapters: int
    passes: int
    sampling: int

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> MemoryAccount:
        """Of the device that a model's weights are on now, or a part of them.

        Args:
            config: says what the process does with the model. On a CPU its ranks share one memory.
        """
        on_gpu = device.type == "cuda"
        free = free_memory(device) // (1 if on_gpu else config.num_ranks)
        rest = free * (1 - (_SPARE_GPU if on_gpu else _SPARE_CPU))
        if not config.trains:
            return cls(0, 0, int(rest))
        training = 1.0 if config.samples else 1 / (_ADAPTERS + _PASSES)
        return cls(
            adapters=int(rest * _ADAPTERS * training),
            passes=int(rest * _PASSES * training),
            sampling=int(rest * _SAMPLING) if config.samples else 0,
        )


def free_memory(device: torch.device) -> int:
    """Bytes of a device that no program has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()


def _free_host_memory() -> int:
    """Bytes available without swapping; 8 GiB if the system doesn't say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):  # in kB; unlike MemFree, includes reclaimable caches
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30


# ---------------------------------------------------------------- running out

# Errors of a CUDA library that mean the same, and leave the device as it was. (cuBLAS allocates a workspace.)
_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory is left, on a GPU or on the host, and nothing worse."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def giving_memory_back(device: torch.device, compute: Callable[[], T]) -> T:
    """The result; if memory runs out, what has been allocated for it is free again.

    Not a context manager, which would put back the frames that hold the tensors.

    Raises:
        torch.OutOfMemoryError, MemoryError: if memory has run out.
    """
    try:
        return compute()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
        out_of_memory = kind(str(error))
    release_cached(device)
    raise out_of_memory


def release_cached(device: torch.device) -> None:
    """Give memory that torch keeps for its next allocations back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
