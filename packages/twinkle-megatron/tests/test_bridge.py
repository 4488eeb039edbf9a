"""Families without a weight map here, by way of Megatron-Bridge: all their numbers are PEFT's, or they are refused.

Where Megatron-Bridge is not installed, as on Python 3.11, only what is said of that is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import bridged_twins
import megatron_ranks
import numpy as np
import peft_alone
import pytest
import tiny_models
import torch
from rank_processes import RankProcesses
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, VOCAB_SIZE
from transformers import (
    Gemma2Config,
    GemmaConfig,
    MistralConfig,
    NemotronConfig,
    OlmoeConfig,
    PretrainedConfig,
    StableLmConfig,
)

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig
from twinkle_megatron import bridge
from twinkle_megatron.architecture import describe

needs_bridge = pytest.mark.skipif(
    not bridge.is_installed(),
    reason="megatron-bridge is not installed: twinkle-megatron[bridge], Python 3.12",
)
# As against PEFT on the families that have a map: see test_against_peft.
TOLERANCE = 1e-5
AFTER_STEPS = 1e-4
TENANTS = {
    "ada": AdapterSpec(rank=8, alpha=32.0, seed=1),
    "cyd": AdapterSpec(rank=3, alpha=16.0, seed=3, train_unembed=False),
}


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """`mistral(tied)`: the directory of a tiny model."""
    saved: dict[bool, Path] = {}

    def get(tied: bool) -> Path:
        if tied not in saved:
            config = MistralConfig(**SIZES, head_dim=16, sliding_window=None, tie_word_embeddings=tied)
            saved[tied] = tiny_models.save_random(config, tmp_path_factory.mktemp("mistral"))
        return saved[tied]

    return get


@needs_bridge
@pytest.mark.parametrize(
    ("layout", "tied"),
    [("TP1", True), ("TP2", False), ("PP2", False), ("PP2", True), ("TP2xPP2", True), ("TP2+SP", False)],
)
def test_two_tenants_equal_peft_alone(
    layout: str, tied: bool, mistral: Callable[[bool], Path], ranks: Callable[[Path, str], RankProcesses]
) -> None:
    path = mistral(tied)
    backend = ranks(path, layout).backend()
    peft: dict[str, Any] = {}
    for who, spec in TENANTS.items():
        backend.add_adapter(who, spec)
        peft[who] = peft_alone.make(path, backend.export_adapter(who, with_optimizer=False))
    optimizers = {
        who: torch.optim.AdamW(peft_alone.parameters(model).values(), lr=1e-3, weight_decay=0.0)
        for who, model in peft.items()
    }
    step = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    for i in range(3):
        rows = [
            peft_alone.random_row(who, 7 + 6 * k, 10 * i + k, VOCAB_SIZE) for k in range(2) for who in peft
        ]
        [results] = backend.forward_backward([rows])
        for who, model in peft.items():
            optimizers[who].zero_grad()
            own = [row for row in rows if row.adapter_id == who]
            peft_alone.loss(model, own).backward()
            for row, result in zip(rows, results, strict=True):
                if row.adapter_id == who:
                    expected = peft_alone.logprobs(model, row).detach()
                    np.testing.assert_allclose(result.logprobs, expected, rtol=TOLERANCE, atol=TOLERANCE)
            gradients = backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
            assert gradients is not None
            wanted = {name: p.grad.numpy() for name, p in peft_alone.parameters(model).items()}
            assert_close(gradients, wanted, TOLERANCE)
            optimizers[who].step()
        backend.optim_step([AdamStep(who, step) for who in peft])
    for who, model in peft.items():
        wanted = {name: p.detach().numpy() for name, p in peft_alone.parameters(model).items()}
        assert_close(backend.export_adapter(who, with_optimizer=False).weights, wanted, AFTER_STEPS)
    backend.close()


@needs_bridge
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {}),
        ("qwen3", {"tensor_parallel_size": 2}),
        ("qwen3", {"pipeline_parallel_size": 2}),
        ("qwen2", {"tensor_parallel_size": 2}),
        ("llama", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ],
)
def test_its_weights_are_those_of_our_own_map(
    family: str, layout: dict[str, Any], model: Callable[[str], Path]
) -> None:
    assert bridged_twins.different_parameters(ModelConfig(model(family), **layout)) == []


@needs_bridge
@pytest.mark.parametrize(
    ("hf", "named"),
    [
        (MistralConfig(**SIZES, sliding_window=16), r"window_size = \[15, 0\]"),
        (GemmaConfig(**SIZES, head_dim=8), r"layernorm_zero_centered_gamma = True.*GemmaModelProvider adds"),
        (Gemma2Config(**SIZES, head_dim=8), "attn_logit_softcapping = 50.0"),
        (NemotronConfig(**SIZES), "activation_func = squared_relu"),
        (OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2), "num_moe_experts = 4"),
        (StableLmConfig(**SIZES), "it says .*StableLmForCausalLM.* not yet supported"),
    ],
    ids=["sliding window", "scaled embeddings", "soft caps", "no gate", "experts", "unknown to it"],
)
def test_what_the_layers_here_would_compute_otherwise(hf: PretrainedConfig, named: str) -> None:
    hf.architectures = [f"{type(hf).__name__.removesuffix('Config')}ForCausalLM"]
    with pytest.raises(InvalidRequest, match=f"no weight map for '{hf.model_type}'.*{named}"):
        describe(hf, ModelConfig(Path()))


@needs_bridge
def test_linear_attention_is_refused() -> None:
    from transformers import MiniMaxConfig

    hf = MiniMaxConfig(**SIZES)
    hf.architectures = ["MiniMaxForCausalLM"]
    with pytest.raises(InvalidRequest, match="no weight map for 'minimax'"):
        describe(hf, ModelConfig(Path()))


@needs_bridge
@pytest.mark.parametrize("fault", ["too many", "too few", "another shape"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_all_ranks(
    fault: str, mistral: Callable[[bool], Path], tmp_path: Path
) -> None:
    source = mistral(False)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.{}_proj.weight"
    if fault == "too many":
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
        said = r"leaves out model\.layers\.1\.self_attn\.q_norm\.weight"
    elif fault == "too few":
        del tensors[name.format("k")]
        said = r"nothing for decoder\.layers\..\.self_attention\.linear_qkv\.weight"
    else:
        tensors[name.format("o")] = tensors[name.format("o")][:, :32].contiguous()
        said = r"self_attn\.o_proj\.weight have another shape"
    (tmp_path / "config.json").symlink_to(source / "config.json")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layouts: list[dict[str, Any]] = [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
    for layout in layouts:
        with pytest.raises(InvalidRequest, match=said):
            megatron_ranks.start(ModelConfig(tmp_path, **layout))


# ---------------------------------------------------------------- without it


@pytest.mark.parametrize("version", [None, "0.3.1"])
def test_without_it_one_is_told_what_to_install(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    said = r"no weight map for 'mistral'.*install megatron-bridge 0\.6 .*Python 3\.12.*use_megatron: false"
    with pytest.raises(InvalidRequest, match=said):
        describe(MistralConfig(**SIZES), ModelConfig(Path()))


def test_versions_that_do_not_go_together_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"no {name} today")

    bridge._import.cache_clear()
    monkeypatch.setattr(bridge, "is_installed", lambda: True)
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(InvalidRequest, match=r"can't be imported \(no .* today\)"):
        describe(MistralConfig(**SIZES), ModelConfig(Path()))
    bridge._import.cache_clear()
