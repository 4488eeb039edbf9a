"""The device: what it is, what it reaches in a plain product and a plain copy, and where a pass's time goes on it."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from on_gpu.models import synchronize
from on_gpu.reckoning import Peak, peak_of

# Those that are used where they are installed; without them their work is done in another way.
_OPTIONAL = ("flash-linear-attention", "causal-conv1d", "liger-kernel", "flash-attn", "peft", "vllm")
_NEEDED = ("torch", "transformers", "numpy", "safetensors", "triton")

# The first class any of whose words is in a kernel's name (or, on a CPU, in an operator's).
_CLASSES = {
    "attention": "flash fmha attention sdpa mem_eff",
    "linear attention": "delta chunk_ conv1d conv_depthwise convolution recurrent cumsum",
    "products": "gemm nvjet cutlass cublas xmma gemv splitk ::mm ::bmm addmm baddbmm",
    "copies": "memcpy memset copy catarray ::cat ::fill fillfunctor",
    "indexing": "index gather scatter embedding ::select sort nonzero",
    "sums and norms": "reduce softmax norm logsumexp ::sum ::mean",
    "elementwise": "elementwise vectorized multi_tensor foreach triton swiglu rope ::mul ::add ::silu",
}


def facts(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    found: dict[str, Any] = {"device": device_name(device), "python": platform.python_version()}
    found |= {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {
            "cuda": torch.version.cuda,
            "compute capability": f"{major}.{minor}",
            "memory, GiB": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        }
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Ceiling:
    """What the device does with nothing else to do.

    Attributes:
        flops: FLOP/s of a large bfloat16 product of random matrices.
        bandwidth: bytes/s, read and written, of a large copy.
        peak: by the data sheet, if it is known.
    """

    flops: float
    bandwidth: float
    peak: Peak | None


def ceiling(device: torch.device, is_toy: bool) -> Ceiling:
    size, numbers = (256, 2**20) if is_toy else (8192, 2**30)
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _seconds(device, lambda: one @ other)
    source = torch.empty(numbers, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = _seconds(device, lambda: target.copy_(source))
    return Ceiling(2 * size**3 / product, 2 * source.nbytes / copy, peak_of(device_name(device)))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Mean of ten times, after three."""
    for _ in range(3):
        work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / 10


def time_by_class(device: torch.device, work: Callable[[], object]) -> tuple[dict[str, float], int, float]:
    """Where the time of some work goes.

    Returns:
        Milliseconds by class of kernel (on a CPU: of operator), the largest first; how many there were; and seconds of
        the whole.
    """
    on_gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - began
    by_class: Counter[str] = Counter()
    count = 0
    for kernel in found.key_averages():
        spent = kernel.self_device_time_total if on_gpu else kernel.self_cpu_time_total
        # What was called on the host carries the time of its kernels too.
        if spent > 0 and (kernel.device_type.name == "CPU") != on_gpu:
            by_class[class_of(kernel.key)] += spent / 1000
            count += kernel.count
    return dict(by_class.most_common()), count, seconds


def class_of(kernel: str) -> str:
    """
    Args:
        kernel: its name, or that of an operator.
    """
    name = kernel.lower()
    return next(
        (label for label, words in _CLASSES.items() if any(w in name for w in words.split())), "other"
    )
