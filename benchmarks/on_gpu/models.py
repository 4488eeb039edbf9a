"""Models with random weights in the shapes of published ones, made on the device; and in toy size."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3_5TextConfig, Qwen3Config

from twinkle.server.backends.hf.base_model import DTYPES, LoadedModel, freeze
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

CONTEXT_LENGTH = 8192

# As in the published config.json of each. Of Qwen3.5 the text model: three layers of linear attention before each of
# full attention, 32 value heads to 16 key heads there.
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
    "Qwen3-4B": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "Qwen3.5-4B": {
        "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    },
}  # fmt: skip

# All three in a size for a CPU; the contract's tokens are below 100.
_TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_TOY_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


def config_of(name: str, is_toy: bool) -> PreTrainedConfig:
    """
    Args:
        name: one of SHAPES.
    """
    is_hybrid = name.startswith("Qwen3.5")
    shape = SHAPES[name]
    if is_toy:
        shape = (
            {**_TOY, "num_hidden_layers": 4, **_TOY_LINEAR} if is_hybrid else {**_TOY, "num_hidden_layers": 2}
        )
    kind: Any = Qwen3_5TextConfig if is_hybrid else Qwen3Config
    return kind(
        **shape,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


@dataclass(frozen=True, eq=False)
class Made:
    """A base model on a device, and what it would have been loaded by."""

    loaded: LoadedModel
    config: ModelConfig

    def backend(self) -> TransformersBackend:
        """A new one, without adapters."""
        return TransformersBackend(self.config, self.loaded)


def make(stack: ExitStack, shape: PreTrainedConfig, device: torch.device, dtype: str) -> Made:
    """
    Args:
        stack: removes the folder with the model's config.json at its end.
        dtype: "bfloat16" or "float32".
    """
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    torch.manual_seed(0)
    # On the device from the beginning: to draw billions of numbers on the host takes minutes.
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=DTYPES[dtype])
    model.config.save_pretrained(directory)
    config = ModelConfig(directory, dtype, str(device))
    return Made(freeze(model, config), config)


def trained_adapter(backend: TransformersBackend, name: str, spec: AdapterSpec) -> AdapterState:
    """Add an adapter as it might be after training: B, which begins as zero, is drawn from the adapter's seed too."""
    backend.add_adapter(name, spec)
    state = backend.export_adapter(name, with_optimizer=False)
    draw = np.random.default_rng(spec.seed)
    for key, matrix in state.weights.items():
        if "lora_B" in key:
            matrix[:] = draw.standard_normal(matrix.shape, np.float32) * 0.02
    backend.import_adapter(name, state)
    return state


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
