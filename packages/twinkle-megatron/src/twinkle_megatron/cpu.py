"""Lets Megatron-Core run without a GPU: it was written for CUDA, and names that device in a few places.

With a GPU these functions do nothing. They change this process's torch, so a rank has its own process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any, cast

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Redirect what Megatron-Core asks torch.cuda for to the CPU. Once per process, before a model is built."""
    cuda = cast("Any", torch.cuda)
    cuda.current_device = _cpu  # rotary embeddings and the buffers of the pipeline's messages
    cuda.synchronize = _nothing  # after the shapes of the pipeline's messages have been exchanged
    # With sequence parallelism the embedding forks it for a dropout of 0.
    megatron_random.initialize_rng_tracker()
    cast("Any", megatron_random)._CUDA_RNG_STATE_TRACKER = _NoRandomness()


@contextlib.contextmanager
def schedules_on(device: torch.device) -> Generator[None]:
    """While Megatron-Core's schedules run: the tensors they create on "cuda" are created on `device`."""
    if device.type == "cuda":
        yield
        return
    with _InsteadOfCuda(device):  # torch keeps it for this thread alone
        yield


class _InsteadOfCuda(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if kwargs and kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **(kwargs or {}))


class _NoRandomness:
    @contextlib.contextmanager
    def fork(self, name: str = "") -> Generator[None]:
        del name
        yield


def _cpu() -> torch.device:
    return torch.device("cpu")


def _nothing(device: object = None) -> None:
    del device
