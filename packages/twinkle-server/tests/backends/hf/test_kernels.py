"""Which code computes recurrent layers, and what is said of it.

No GPU here: a package stands in the place of flash-linear-attention, in a process of its own, and fails on a CPU as it
does.
"""

import subprocess
import sys
from pathlib import Path

import tiny_qwen3_5
import torch

from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.hf.kernels import choose_kernels
from twinkle.server.backends.protocol import ModelConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")

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
print(*choose_kernels(Qwen3_5ForCausalLM.from_pretrained(path), torch.device("cuda")))
print(*load_base_model(ModelConfig(path)).info.notes)
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
    on_gpu, on_cpu = said_with(tmp_path / "both", model, FAILS_ON_A_CPU, FOR_GPUS)
    assert on_gpu == (
        "Kernels of causal-conv1d and flash-linear-attention compute recurrent layers (linear attention, convolutions)."
    )
    assert "reference code computes recurrent layers" in on_cpu and "WARNING" not in on_cpu
    on_gpu, _ = said_with(tmp_path / "one", model, FAILS_ON_A_CPU, "raise ImportError('for another torch')")
    assert on_gpu.startswith("WARNING: Transformers' reference code computes")
    assert "the kernels of causal-conv1d. Install them" in on_gpu


def test_a_gpu_without_kernels_is_warned_of(tmp_path: Path, tiny_model_dir: Path) -> None:
    loaded = load_base_model(ModelConfig(tiny_qwen3_5.save(tmp_path, 128, 3, 64)))
    [note] = loaded.info.notes
    assert note.startswith("Transformers' reference code computes recurrent layers")
    [warning] = choose_kernels(loaded.model, GPU)
    assert warning.startswith("WARNING: ") and "twinkle-server[gpu]" in warning
    assert "causal-conv1d and flash-linear-attention" in warning
    plain = load_base_model(ModelConfig(tiny_model_dir))
    assert plain.info.notes == () == choose_kernels(plain.model, CPU) == choose_kernels(plain.model, GPU)
