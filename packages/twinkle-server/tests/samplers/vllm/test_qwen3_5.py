"""A Qwen3.5 as it is published, in vLLM: adapters under the names of the class that holds the text model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen3_5
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sampling_contract import ask, plain_logprobs, prompts
from transformers import AutoModelForCausalLM
from vllm_engines import require_vllm

from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

require_vllm()


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 64 numbers, or vLLM's linear attention doesn't compute it on a CPU; it computes in bfloat16 alone.

    The output head is small: logits of 4 have steps of 0.03 in bfloat16.
    """
    directory = tmp_path_factory.mktemp("qwen3.5-for-vllm")
    tiny_qwen3_5.save(directory, 512, 0, 1024, head_dim=64)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] /= 4
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for file in tiny_model_dir.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def states(model_dir: Path) -> dict[str, AdapterState]:
    backend = TransformersBackend(ModelConfig(model_dir, torch_dtype="bfloat16"))
    states: dict[str, AdapterState] = {}
    for seed, name in enumerate(("one", "two"), start=1):
        backend.add_adapter(name, AdapterSpec(rank=4, alpha=8, seed=seed))
        states[name] = backend.export_adapter(name, with_optimizer=False)
        draw = np.random.default_rng(seed)
        for tensor, matrix in states[name].weights.items():
            if "lora_B" in tensor:
                matrix[:] = draw.normal(size=matrix.shape) * 0.05
    return states


@pytest.fixture(scope="module")
def engine(model_dir: Path, states: dict[str, AdapterState]) -> Iterator[Any]:
    from twinkle.server.samplers.vllm import VllmEngine

    config = ModelConfig(model_dir, torch_dtype="bfloat16", max_lora_rank=4, max_sampler_adapters=2)
    engine = VllmEngine.create(config, None)
    for name, state in states.items():
        engine.add_adapter(name, state)
    yield engine
    engine.close()


@pytest.mark.timeout(600)
def test_log_probabilities_are_pefts_within_two_hundredths(
    engine: Any, model_dir: Path, states: dict[str, AdapterState], tmp_path: Path
) -> None:
    references: dict[str | None, torch.nn.Module] = {}
    for name, state in ((None, None), *states.items()):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
        if name is not None and state is not None:
            (tmp_path / name).mkdir()
            peft_format.write(tmp_path / name, state, str(model_dir))
            model = PeftModel.from_pretrained(model, tmp_path / name).eval()
        references[name] = model
    cases = [(prompt, name) for prompt in prompts(3, seed=5) for name in references]
    asked = [ask(engine, p, a, temperature=0, max_tokens=8, stop=[], prompt_logprobs=True) for p, a in cases]
    seen: dict[str | None, list[list[float]]] = {name: [] for name in references}
    for (prompt, name), future in zip(cases, asked, strict=True):
        response = future.result(300)
        [sequence] = response.sequences
        plain = plain_logprobs(references[name], prompt + sequence.tokens)
        expected = [plain[i, token].item() for i, token in enumerate((prompt + sequence.tokens)[1:])]
        found = [*response.prompt_logprobs[1:], *sequence.logprobs]
        np.testing.assert_allclose(np.array(found, float), expected, atol=0.02)
        seen[name].append(found[: len(prompt) - 1])
    # An adapter whose names nobody knew would have the base model's.
    for name in states:
        assert all(np.abs(np.subtract(a, b)).max() > 0.1 for a, b in zip(seen[name], seen[None], strict=True))
