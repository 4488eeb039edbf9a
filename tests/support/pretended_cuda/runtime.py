"""What `torch.cuda` answers in a process with a pretended device, and how threads come to see it."""

from __future__ import annotations

import threading
from typing import Any

import torch

from pretended_cuda.counts import COUNTS
from pretended_cuda.tensor import PretendedCuda

# Of one H200, next to empty.
_TOTAL_BYTES = 141 * 2**30
_FREE_BYTES = 130 * 2**30
_CAPABILITY = (9, 0)


def install() -> None:
    """From here on, to the end of the process, there is one GPU, for this thread and those that it starts."""
    _answer(
        _lazy_init=None,
        is_available=True,
        is_initialized=True,
        device_count=1,
        current_device=0,
        set_device=None,
        mem_get_info=(_FREE_BYTES, _TOTAL_BYTES),
        # What is allocated isn't counted.
        memory_allocated=0,
        max_memory_allocated=0,
        reset_peak_memory_stats=None,
        empty_cache=None,
        get_device_capability=_CAPABILITY,
        is_bf16_supported=True,
        # The CPU's generator draws all random numbers.
        get_rng_state=torch.empty(0, dtype=torch.uint8),
        set_rng_state=None,
        manual_seed=None,
        manual_seed_all=None,
    )
    torch.cuda.synchronize = lambda *_: COUNTS.add_wait("synchronize")
    # Pretended tensors don't survive inference mode, where operations come undivided. It computes the same.
    torch.inference_mode = torch.no_grad  # pyright: ignore
    _see_devices_in_threads()
    _enter()


def _answer(**answers: Any) -> None:
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


def _enter() -> None:
    # torch.tensor(..., device="cuda") then makes a CPU tensor, and moves it where the mode sees it. Of each thread.
    torch._C._set_only_lift_cpu_tensors(True)
    PretendedCuda().__enter__()


def _see_devices_in_threads() -> None:
    original = threading.Thread.run

    def run(self: threading.Thread) -> None:
        _enter()
        original(self)

    threading.Thread.run = run
