"""A tiny model, adapters, one vLLM engine for all tests that don't end it, and PEFT's models of the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from vllm_engines import save_model

from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

SPECS = {
    "small": AdapterSpec(rank=4, seed=1),
    "other": AdapterSpec(rank=4, seed=2),
    "large": AdapterSpec(rank=16, seed=3, alpha=8, train_unembed=False),
}


@pytest.fixture(scope="session")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model_dir, tmp_path_factory.mktemp("tiny-for-vllm"))


@pytest.fixture(scope="session")
def backend(model_dir: Path) -> TransformersBackend:
    torch.set_num_threads(1)
    return TransformersBackend(ModelConfig(model_dir))


@pytest.fixture(scope="session")
def random_state(backend: TransformersBackend) -> Any:
    """Makes an adapter whose B is not zero."""

    def made(spec: AdapterSpec) -> AdapterState:
        backend.add_adapter("temporary", spec)
        state = backend.export_adapter("temporary", with_optimizer=False)
        backend.remove_adapter("temporary")
        draw = np.random.default_rng(spec.seed)
        for name, matrix in state.weights.items():
            if "lora_B" in name:
                matrix[:] = draw.normal(size=matrix.shape) * 0.05
        return state

    return made


@pytest.fixture(scope="session")
def peft_model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain model with an adapter, by PEFT; None: without."""

    def made(state: AdapterState | None) -> torch.nn.Module:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        if state is None:
            return base
        directory = tmp_path_factory.mktemp("adapter")
        peft_format.write(directory, state, str(model_dir))
        return PeftModel.from_pretrained(base, directory).eval()

    return made


@pytest.fixture(scope="session")
def states(random_state) -> dict[str, AdapterState]:
    return {name: random_state(spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="session")
def references(states, peft_model) -> dict[str | None, torch.nn.Module]:
    named: dict[str | None, AdapterState | None] = {None: None, **states}
    return {name: peft_model(state) for name, state in named.items()}


@pytest.fixture(scope="session")
def shared_engine(model_dir: Path) -> Iterator[Any]:
    from twinkle.server.samplers.vllm import VllmEngine

    config = ModelConfig(model_dir, max_lora_rank=16, max_sampler_adapters=10)
    engine = VllmEngine.create(config, None)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine, states) -> Any:
    """The shared one, with all adapters again, whatever a test has removed."""
    for name, state in states.items():
        shared_engine.add_adapter(name, state)
    return shared_engine
