"""A tiny model, adapters, the engine that has them, and PEFT's models of the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.transformers import TransformersEngine

SPECS = {
    "small": AdapterSpec(rank=4, seed=1),
    "other": AdapterSpec(rank=4, seed=2),
    "large": AdapterSpec(rank=16, seed=3, alpha=8, train_unembed=False),
}


def random_state(backend: TransformersBackend, spec: AdapterSpec) -> AdapterState:
    """An adapter whose B is not zero."""
    backend.add_adapter("temporary", spec)
    state = backend.export_adapter("temporary", with_optimizer=False)
    backend.remove_adapter("temporary")
    draw = np.random.default_rng(spec.seed)
    for name, matrix in state.weights.items():
        if "lora_B" in name:
            matrix[:] = draw.normal(size=matrix.shape) * 0.05
    return state


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path) -> Path:
    return tiny_model_dir


@pytest.fixture(scope="module")
def backend(model_dir: Path) -> TransformersBackend:
    torch.set_num_threads(1)
    return TransformersBackend(ModelConfig(model_dir))


@pytest.fixture(scope="module")
def states(backend: TransformersBackend) -> dict[str, AdapterState]:
    return {name: random_state(backend, spec) for name, spec in SPECS.items()}


@pytest.fixture
def engine(backend: TransformersBackend, model_dir: Path, states) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(backend.loaded, ModelConfig(model_dir), max_rows=8)
    for name, state in states.items():
        engine.add_adapter(name, state)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def references(
    model_dir: Path, states, tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, torch.nn.Module]:
    """Plain models, one an adapter, by PEFT."""

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    models: dict[str | None, torch.nn.Module] = {None: base()}
    for name, state in states.items():
        directory = tmp_path_factory.mktemp(name)
        peft_format.write(directory, state, str(model_dir))
        models[name] = PeftModel.from_pretrained(base(), directory, torch_device="cpu").eval()
    return models


@pytest.fixture(scope="module")
def linear_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5: layers of linear attention, which keep states."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    directory = tmp_path_factory.mktemp("tiny-qwen3.5")
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    Qwen3_5ForCausalLM(config).eval().save_pretrained(directory)
    return directory
