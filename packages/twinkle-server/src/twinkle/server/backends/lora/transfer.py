"""From the host to the device without waiting for it.

Trainer and sampler share a GPU's stream: whoever waits for a copy waits for all that the other has queued before it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """What is in a tensor of the host, on the device; on a CPU the tensor itself.

    From pinned memory a GPU copies when it comes to it; torch keeps that memory until then. For memory that is not
    pinned it waits.
    """
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
