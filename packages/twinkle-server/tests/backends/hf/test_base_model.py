import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import save
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.contract.parts import train
from twinkle.server.backends.hf.base_model import (
    copy_sharing_weights,
    find_targets,
    load_base_model,
)
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": [3, 4],
    "pad_token_id": 0,
}

QWEN2 = Qwen2Config(**SIZES)
HYBRID = Qwen3_5TextConfig(
    **SIZES,
    head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MIXTURE = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def test_a_loaded_model_is_frozen_and_described(tiny_model_dir: Path) -> None:
    loaded = load_base_model(ModelConfig(tiny_model_dir, max_lora_rank=9))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    info = loaded.info
    assert (info.vocab_size, info.max_context_length, info.max_lora_rank) == (512, 256, 9)
    assert (info.eos_token_ids, info.architecture) == ((256,), "Qwen3ForCausalLM")
    assert info.max_batch_tokens >= 256
    groups = list(loaded.targets.values())
    assert [groups.count(group) for group in ("attn", "mlp", "unembed")] == [8, 6, 1]


def test_the_context_can_be_shortened(tiny_model_dir: Path) -> None:
    assert load_base_model(ModelConfig(tiny_model_dir, max_context_length=100)).info.max_context_length == 100
    with pytest.raises(InvalidRequest, match="257 is not between 1 and 256"):
        load_base_model(ModelConfig(tiny_model_dir, max_context_length=257))


def test_a_copy_has_the_same_tensors_in_another_tree(tiny_tied_model_dir: Path) -> None:
    model = load_base_model(ModelConfig(tiny_tied_model_dir)).model
    copied = copy_sharing_weights(model)
    for (name, one), (other_name, other) in zip(
        model.named_parameters(remove_duplicate=False),
        copied.named_parameters(remove_duplicate=False),
        strict=True,
    ):
        assert name == other_name and one is other
    assert copied.get_submodule("lm_head") is not model.get_submodule("lm_head")


def test_targets_of_a_hybrid_and_of_a_mixture_of_experts(tmp_path: Path) -> None:
    loaded = load_base_model(ModelConfig(save(HYBRID, tmp_path / "hybrid")))
    assert loaded.info.eos_token_ids == (3, 4)
    assert loaded.info.trainable == ("attn", "mlp", "unembed")
    hybrid = loaded.targets
    assert hybrid["model.layers.0.linear_attn.in_proj_qkv"] == "attn"
    assert hybrid["model.layers.0.linear_attn.out_proj"] == "attn"
    assert hybrid["model.layers.1.self_attn.q_proj"] == "attn"
    experts = load_base_model(ModelConfig(save(MIXTURE, tmp_path / "moe")))
    assert [name for name, group in experts.targets.items() if group == "mlp"] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert experts.experts == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def test_a_linear_layer_that_computes_otherwise_than_its_matrix_says_is_no_target(tmp_path: Path) -> None:
    """As one that has a block of outputs for each group of inputs; one that only writes it otherwise is."""

    class Grouped(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.flip(-1))

    class Written(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + self.bias

    model = AutoModelForCausalLM.from_pretrained(save(QWEN2, tmp_path))
    attention = model.model.layers[0].self_attn
    for name, kind in (("q_proj", Grouped), ("k_proj", Written)):
        layer = getattr(attention, name)
        layer.__class__ = kind
    targets, _ = find_targets(model)
    assert "model.layers.0.self_attn.q_proj" not in targets
    assert "model.layers.0.self_attn.k_proj" in targets


def test_experts_of_another_form_are_left_alone(tmp_path: Path) -> None:
    """Those of GPT-OSS are transposed, clamped and have biases."""
    config = GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2
    )
    backend = TransformersBackend(ModelConfig(save(config, tmp_path)))
    assert set(backend.loaded.targets.values()) == {"attn", "unembed"} and not backend.loaded.experts
    assert backend.info.trainable == ("attn", "unembed")
    with pytest.raises(InvalidRequest, match="no linear layer is left to train"):
        backend.add_adapter("b", AdapterSpec(rank=2, train_attn=False, train_unembed=False))
    backend.add_adapter("a", AdapterSpec(rank=2))
    train(backend, "a")


def test_experts_in_mxfp4_are_made_whole(tmp_path: Path) -> None:
    """As GPT-OSS is published: two numbers of 4 bits a byte, the lower half first, 32 to a scale, a power of two."""
    sizes: dict[str, Any] = {
        **SIZES,
        "intermediate_size": 64,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    }
    config = GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=2)
    save(config, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    draw = np.random.default_rng(0)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected: dict[str, torch.Tensor] = {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        codes = draw.integers(0, 16, (experts, rows, -(-columns // 32), 32))
        scales = draw.integers(120, 128, codes.shape[:3])
        weights[f"{name}_blocks"] = torch.from_numpy(
            (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
        )
        weights[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))
        whole = table[codes] * 2.0 ** (scales[..., None] - 127)
        expected[name] = torch.from_numpy(whole.reshape(experts, rows, -1)).transpose(1, 2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load_base_model(ModelConfig(tmp_path))
    for name, matrix in expected.items():
        torch.testing.assert_close(loaded.model.get_parameter(name).double(), matrix)
    backend = TransformersBackend(ModelConfig(tmp_path), loaded)
    backend.add_adapter("a", AdapterSpec(rank=2))
    train(backend, "a")


def test_what_can_not_be_loaded_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    (broken / "model.safetensors").unlink()
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_model_dir, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(
        json.dumps(config | {"model_type": "no-such-model", "architectures": []})
    )
    for wrong, message in (
        (ModelConfig(tmp_path), "no config.json"),
        (ModelConfig(broken), "holds neither model.safetensors"),
        (ModelConfig(unknown), "can't be loaded"),
        (ModelConfig(tiny_model_dir, torch_dtype="float16"), "'float16' is not one of float32, bfloat16"),
        (ModelConfig(tiny_model_dir, torch_dtype="int8"), "'int8' is not one of float32"),
        (ModelConfig(tiny_model_dir, tensor_parallel_size=2), "whole layers"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            load_base_model(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="torch sees no GPU"):
        load_base_model(ModelConfig(tiny_model_dir, device="cuda"))


def test_a_model_without_layers_for_lora_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    save(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32), tmp_path)
    with pytest.raises(InvalidRequest, match="no linear layers"):
        load_base_model(ModelConfig(tmp_path))


def test_weights_on_disk_are_not_touched(tiny_model_dir: Path) -> None:
    before = (tiny_model_dir / "model.safetensors").read_bytes()
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    backend.add_adapter("a", AdapterSpec(rank=1))
    train(backend, "a")
    assert np.array_equal(before, (tiny_model_dir / "model.safetensors").read_bytes())
