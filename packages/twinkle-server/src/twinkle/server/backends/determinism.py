"""The same bits each time on a GPU (`model.deterministic`).

A CPU adds in one order. On a GPU some kernels add in whatever order their threads arrive: the backward pass of
attention, `index_add`, `scatter_add`; and cuBLAS may choose another kernel for a product that runs beside others.
"""

from __future__ import annotations

import os

from twinkle.server.backends.protocol import ModelConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def use_deterministic_kernels(config: ModelConfig) -> None:
    """If `config` asks for it and the device is a GPU: for this whole process, and before it uses the GPU.

    What has no deterministic kernel raises `RuntimeError` from then on.
    """
    if not config.deterministic or config.device == "cpu":
        return
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # torch refuses products without one of cuBLAS's two values
    import torch

    torch.use_deterministic_algorithms(True)
