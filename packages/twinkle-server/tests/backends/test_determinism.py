"""What `model.deterministic` sets, in processes of their own: it is for all of a process."""

import subprocess
import sys

PROGRAM = """
import os, sys
from pathlib import Path
from twinkle.server.backends.determinism import use_deterministic_kernels
from twinkle.server.backends.protocol import ModelConfig

use_deterministic_kernels(ModelConfig(Path("model"), device=sys.argv[1], deterministic=sys.argv[2] == "asked"))
import torch
print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


def after(device: str, asked: str) -> str:
    command = [sys.executable, "-c", PROGRAM, device, asked]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_only_a_gpu_is_set_and_only_if_asked_for() -> None:
    assert after("cuda", "asked") == "True :4096:8"
    assert after("cuda", "not asked") == after("cpu", "asked") == "False None"
