"""vLLM engines for tests: each takes half a minute to start."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def require_vllm() -> None:
    """Skip the module that calls this where vLLM isn't installed."""
    if find_spec("vllm") is None:
        pytest.skip(
            "vllm is not installed here: `scripts/hatch run vllm:test` runs these tests",
            allow_module_level=True,
        )


def save_model(like: Path, directory: Path) -> Path:
    """A random model as in `like`, with heads of 32 numbers: fewer are too few for vLLM's attention on a CPU."""
    config = AutoConfig.from_pretrained(like)
    config.head_dim = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for file in like.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def processes_of_vllm() -> set[psutil.Process]:
    """All that vLLM engines of this process have started."""
    found = psutil.Process().children(recursive=True)
    return {process for process in found if "resource_tracker" not in " ".join(process.cmdline())}


def kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(list(processes), timeout=30)
