"""PEFT loads adapters on mixtures of experts that have other feed-forward layers, too: shared experts, dense layers.

Each family is compared with Transformers and PEFT on the same files. All of them are families whose target modules PEFT
rewrites (`peft.utils.transformers_weight_conversion`), by the kind of model and the ends of names.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import tiny_moe
import torch
import transformers
from adapter_files import peft_logprobs, trained
from transformers import AutoModelForCausalLM

from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
DENSE_FIRST: dict[str, Any] = {**ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1}
NEXT: dict[str, Any] = {
    **EXPERTS,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3 moe, first layer dense": ("Qwen3MoeConfig", {**EXPERTS, "mlp_only_layers": [0]}),
    "qwen3 next": ("Qwen3NextConfig", NEXT),
    "qwen3 next, last layer dense": ("Qwen3NextConfig", {**NEXT, "mlp_only_layers": [1]}),
    "deepseek v2": ("DeepseekV2Config", {**DENSE_FIRST, **LATENT, "num_key_value_heads": 4}),
    "deepseek v3": ("DeepseekV3Config", {**DENSE_FIRST, **LATENT, "num_key_value_heads": 4}),
    "deepseek v3, all layers dense": (
        "DeepseekV3Config",
        {**ROUTED, **LATENT, "first_k_dense_replace": 2, "num_key_value_heads": 4},
    ),
    "glm4 moe": ("Glm4MoeConfig", DENSE_FIRST),
    "dots1": ("Dots1Config", DENSE_FIRST),
    "ernie 4.5 moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "hunyuan moe": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1}),
    "afmoe, gates in its attention": (
        "AfmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1, "num_shared_experts": 1},
    ),
}
FLAGS = {
    "all": {},
    "attention": {"train_mlp": False, "train_unembed": False},
    "feed-forward": {"train_attn": False, "train_unembed": False},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    for family, (config, more) in FAMILIES.items():
        settings = getattr(transformers, config)(**(tiny_moe.SIZES | more), tie_word_embeddings=False)
        made[family] = random_models.save(settings, tmp_path_factory.mktemp("mixture"))
    return made


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(
    family: str, flags: dict[str, bool], model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    spec = AdapterSpec(rank=3, alpha=10.0, **flags)
    backend, state, ours = trained(model_dirs[family], spec)
    peft_format.write(tmp_path, state, str(model_dirs[family]), backend.info.export)
    base = AutoModelForCausalLM.from_pretrained(model_dirs[family], dtype=torch.float32)
    plain, theirs = peft_logprobs(base, tmp_path)
    assert (plain - theirs).abs().max() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

    read = peft_format.read(tmp_path, with_optimizer=True)
    assert read.spec == spec
    assert set(read.target_modules) == set(state.target_modules)
    assert read.weights.keys() == state.weights.keys()
    assert all(np.array_equal(read.weights[name], matrix) for name, matrix in state.weights.items())
    assert read.optimizer is not None and state.optimizer is not None
    assert read.optimizer.exp_avg.keys() == state.optimizer.exp_avg.keys()


def test_what_was_written_with_target_modules_alone_is_read_still(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    _, state, _ = trained(model_dirs["deepseek v3"], AdapterSpec(rank=3))
    peft_format.write(tmp_path, state, "org/name")  # knows nothing of experts: as before
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.gate_proj" in config["target_modules"]
    read = peft_format.read(tmp_path, with_optimizer=True)
    assert set(read.target_modules) == set(state.target_modules)


def test_a_dense_model_has_target_modules_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    backend, state, _ = trained(tiny_model_dir, AdapterSpec(rank=3))
    peft_format.write(tmp_path, state, "org/name", backend.info.export)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert set(config["target_modules"]) == set(state.target_modules)
