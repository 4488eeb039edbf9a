"""What can't be held as it is asked for is refused before anything is loaded, by the name of the setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_ranks
import pytest
from tiny_models import CONFIGS, SIZES
from transformers import GemmaConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron.architecture import describe


@pytest.mark.parametrize(
    ("family", "sizes", "named"),
    [
        ("llama", {"pipeline_parallel_size": 3}, r"model\.pipeline_parallel_size: 3 ranks .* 2 layers"),
        ("llama", {"tensor_parallel_size": 4}, r"model\.tensor_parallel_size: 4 ranks .* 2 key-value heads"),
        ("llama", {"expert_parallel_size": 2}, r"model\.expert_parallel_size: llama has no routed experts"),
        ("qwen3_moe", {"expert_parallel_size": 3}, r"model\.expert_parallel_size: 3 ranks .* 4 experts"),
        (
            "qwen3_moe",
            {"tensor_parallel_size": 2, "sequence_parallel": False},
            r"model\.sequence_parallel: a mixture of experts .* needs it",
        ),
        ("qwen3_5", {"pipeline_parallel_size": 3}, r"model\.pipeline_parallel_size: 3 ranks .* 2 layers"),
        ("qwen3_5", {"expert_parallel_size": 2}, r"model\.expert_parallel_size: qwen3_5_text has no routed"),
        ("qwen3_5_moe", {"tensor_parallel_size": 4}, r"4 ranks .* 2 key-value heads"),
        (
            "qwen3_5_moe",
            {"tensor_parallel_size": 2, "sequence_parallel": False},
            r"model\.sequence_parallel: a mixture of experts .* needs it",
        ),
    ],
)
def test_sizes_that_do_not_divide(family: str, sizes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        describe(CONFIGS[family](), ModelConfig(Path(), **sizes))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen3_5",
            {"linear_num_key_heads": 1},
            r"tensor_parallel_size: 2 ranks can't share out 1 key heads of linear attention",
        ),
        ("qwen3_5", {"linear_num_key_heads": 3}, r"3 key heads .* don't share out 4 value heads"),
        (
            "qwen3_5",
            {"num_key_value_heads": 1},
            r"tensor_parallel_size: 2 ranks can't share out 1 key-value heads",
        ),
        (
            "qwen3_5",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "full_attention, sliding_attention",
        ),
        (
            "qwen3_5_moe",
            {"shared_expert_intermediate_size": 25},
            r"tensor_parallel_size: 2 ranks can't share out 25 columns of the shared expert",
        ),
    ],
)
def test_parts_of_hybrids_that_can_not_be_spread(family: str, changes: dict[str, Any], message: str) -> None:
    whole = CONFIGS[family]()
    for name, value in changes.items():
        setattr(whole.get_text_config(), name, value)
    with pytest.raises(InvalidRequest, match=message):
        describe(whole, ModelConfig(Path(), tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias = True"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias = True"),
        (Qwen3Config(**SIZES, hidden_act="gelu"), "hidden_act = 'gelu'"),
        (Qwen2Config(**SIZES, use_sliding_window=True), "use_sliding_window = True"),
    ],
    ids=["attention bias", "feed-forward bias", "activation", "sliding window"],
)
def test_parts_that_are_not_built(hf: PretrainedConfig, named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"model: {named} is not known to the Megatron backend"):
        describe(hf, ModelConfig(Path()))


def test_a_family_without_a_map_is_told_what_to_do() -> None:
    with pytest.raises(
        InvalidRequest, match=r"no weight map for 'gemma'.*megatron-bridge.*use_megatron: false"
    ):
        describe(GemmaConfig(**SIZES, head_dim=8), ModelConfig(Path()))


@pytest.mark.parametrize(
    ("family", "sizes", "ranks"),
    [
        ("qwen3", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4),
        ("qwen3_moe", {"expert_parallel_size": 4}, 4),
        ("qwen3_moe", {"tensor_parallel_size": 2, "expert_parallel_size": 4}, 4),
        (
            "qwen3_moe",
            {"tensor_parallel_size": 2, "expert_parallel_size": 2, "pipeline_parallel_size": 2},
            4,
        ),
    ],
)
def test_experts_are_spread_over_the_ranks_of_a_stage(family: str, sizes: dict[str, Any], ranks: int) -> None:
    config = ModelConfig(Path(), **sizes)
    describe(CONFIGS[family](), config)
    assert config.num_ranks == ranks


def test_all_ranks_refuse_alike(model: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidRequest, match=r"model\.tensor_parallel_size: 4 ranks"):
        megatron_ranks.start(ModelConfig(model("qwen3"), tensor_parallel_size=4))


def test_a_checkpoint_of_another_shape_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]()
    config.intermediate_size = 64
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(model("qwen3") / "model.safetensors")
    with pytest.raises(InvalidRequest, match=r"_proj\.weight give .* don't belong together"):
        megatron_ranks.start(ModelConfig(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidRequest, match="no safetensors"):
        megatron_ranks.start(ModelConfig(tmp_path))
