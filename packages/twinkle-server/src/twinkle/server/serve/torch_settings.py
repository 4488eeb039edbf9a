"""How torch is set up in a process that computes; the first part before anything imports it."""

from __future__ import annotations

import os

# Torch reads one of them when it is imported: up to 2.8 only the second, and from 2.9 on it warns of that.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def before_import(device: str) -> None:
    """Set what torch reads from the environment, unless whoever started the server has set it."""
    if device == "cpu":
        # Threads that wait for each other yield their core: by default they spin, and a step takes up to thirty
        # times as long when another program (the client, say) wants the core.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    elif not any(name in os.environ for name in _ALLOCATOR):
        # Each tick has tensors of other sizes than the last. In segments of fixed sizes their memory would be cut into
        # pieces too small for the next ones.
        os.environ.update(dict.fromkeys(_ALLOCATOR, "expandable_segments:True"))


def set_threads(sharers: int) -> None:
    """Use this process's part of the machine's cores: Ray has set the number of CPUs that it assigned.

    On a GPU too: the first weights of adapters are drawn, and states put together, on the host.

    Args:
        sharers: processes that share the machine.
    """
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharers))
