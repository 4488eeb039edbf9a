"""Which code computes recurrent layers, and what is said of it.

No GPU here: a package stands in the place of flash-linear-attention, in a process of its own, and fails on a CPU as it
does.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny_moe
import tiny_qwen3_5
import torch

from twinkle.server.backends.hf import kernel_packages
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.hf.kernel_packages import KernelPackage, describe_installed, how_to_install
from twinkle.server.backends.hf.kernels import choose_kernels
from twinkle.server.backends.protocol import ModelConfig

OTHERS = (
    "Kernels: attention by torch's scaled_dot_product_attention; norms, rotary embedding and activations by "
    "Transformers' own code, log-probabilities by plain torch."
)
GPU = torch.device("cuda")

FAILS_ON_A_CPU = """
def chunk_gated_delta_rule(q, k, v, **settings):
    raise RuntimeError("0 active drivers ([]). There should only be one.")
fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
"""
FOR_GPUS = """
def causal_conv1d_fn(*arguments, **settings):
    raise RuntimeError("Expected x.is_cuda() to be true")
causal_conv1d_update = causal_conv1d_fn
"""
PROGRAM = """
import sys
from pathlib import Path
import torch
from transformers import Qwen3_5ForCausalLM
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.hf.kernels import choose_kernels
from twinkle.server.backends.protocol import ModelConfig

path = Path(sys.argv[1])
print(*choose_kernels(Qwen3_5ForCausalLM.from_pretrained(path), torch.device("cuda")), sep="\\n")
print(*load_base_model(ModelConfig(path)).info.notes, sep="\\n")
"""


def said_with(directory: Path, model: Path, fla: str, causal_conv1d: str) -> list[str]:
    """For a GPU and then for a CPU, in a process that finds packages of these contents."""
    for name, content in (("fla/ops/gated_delta_rule", fla), ("causal_conv1d", causal_conv1d)):
        package = directory / name
        package.mkdir(parents=True)
        for above in (package, *package.parents):
            if above == directory:
                break
            (above / "__init__.py").write_text(content if above == package else "")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(directory)!r})\n{PROGRAM}", str(model)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kernels_are_named_and_not_called_on_a_cpu(tmp_path: Path) -> None:
    model = tiny_qwen3_5.save(tmp_path / "model", 128, 3, 64)
    on_gpu, others, on_cpu, _ = said_with(tmp_path / "both", model, FAILS_ON_A_CPU, FOR_GPUS)
    assert on_gpu == (
        "Kernels of causal-conv1d and flash-linear-attention compute recurrent layers (linear attention, convolutions)."
    )
    assert others == OTHERS
    assert "reference code computes recurrent layers" in on_cpu and "WARNING" not in on_cpu
    on_gpu, *_ = said_with(tmp_path / "one", model, FAILS_ON_A_CPU, "raise ImportError('for another torch')")
    assert on_gpu.startswith("WARNING: Transformers' reference code computes")
    assert "the kernels of causal-conv1d. Install them" in on_gpu
    assert "pip install 'twinkle-server[gpu-compiled]')" in on_gpu


def test_a_gpu_without_kernels_is_warned_of(tmp_path: Path, tiny_model_dir: Path) -> None:
    loaded = load_base_model(ModelConfig(tiny_qwen3_5.save(tmp_path, 128, 3, 64)))
    note, others = loaded.info.notes
    assert note.startswith("Transformers' reference code computes recurrent layers")
    warning, _ = choose_kernels(loaded.model, GPU)
    assert warning.startswith("WARNING: ") and "pip install 'twinkle-server[gpu,gpu-compiled]')" in warning
    assert "flash-linear-attention" in warning and "causal-conv1d" in warning
    plain = load_base_model(ModelConfig(tiny_model_dir))
    assert plain.info.notes == (OTHERS,) == choose_kernels(plain.model, GPU)
    assert others == OTHERS


def test_routed_experts_are_named_by_what_computes_them(tmp_path: Path) -> None:
    [note] = load_base_model(ModelConfig(tiny_moe.save(tmp_path))).info.notes
    assert "; routed experts by one product an expert; " in note


def test_what_is_installed_is_said_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: KernelPackage(name) for name in ("torch", "not-there")}
    monkeypatch.setattr(kernel_packages, "KERNEL_PACKAGES", known)
    assert describe_installed() == (
        f"Packages with kernels for GPUs: torch {metadata.version('torch')}; not installed: not-there"
    )
    assert how_to_install(["mamba_ssm"]) == "mamba_ssm"
