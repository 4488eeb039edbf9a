"""Directories that are not a whole base model are refused with a sentence that names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.protocol import ModelConfig

LAST = "model.layers.1.mlp.up_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"


@pytest.fixture
def whole(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture
def sharded(tiny_model_dir: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def with_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path) -> str:
    with pytest.raises(InvalidRequest) as error:
        load_base_model(ModelConfig(directory))
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", LAST])
def test_a_tensor_in_no_file_is_named_and_not_drawn_at_random(whole: Path, name: str) -> None:
    with_weights(whole, lambda weights: weights.pop(name))
    assert f"is not whole: no file in it holds {name}" in refused(whole)


def test_what_is_tied_may_be_left_out_on_either_side(tiny_tied_model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_tied_model_dir, tmp_path / "tied")
    expected = load_base_model(ModelConfig(directory)).model.get_parameter("lm_head.weight")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    with_weights(
        directory,
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
    )
    assert torch.equal(
        load_base_model(ModelConfig(directory)).model.get_parameter("lm_head.weight"), expected
    )
    with_weights(
        directory, lambda weights: (weights.pop("model.embed_tokens.weight"), weights.pop("lm_head.weight"))
    )
    assert "model.embed_tokens.weight" in refused(directory)


def test_fewer_and_more_layers_than_config_json_says_are_told(whole: Path) -> None:
    with_config(whole, num_hidden_layers=3, layer_types=["full_attention"] * 3, max_window_layers=3)
    assert "is not whole: no file in it holds model.layers.2." in refused(whole)
    with_config(whole, num_hidden_layers=1, layer_types=["full_attention"], max_window_layers=1)
    assert "holds model.layers.1." in refused(whole) and "there are 1 layers" in refused(whole)


def test_spare_tensors_that_are_no_layers_are_left_alone(whole: Path) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["visual.blocks.7.mlp.weight"] = torch.zeros(2)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
        weights["mtp.layers.0.mlp.weight"] = torch.zeros(2)

    with_weights(whole, add)
    load_base_model(ModelConfig(whole))


def test_a_tensor_of_another_shape_is_named(whole: Path) -> None:
    with_weights(whole, lambda weights: weights.update({LAST: torch.zeros(5, 7)}))
    assert f"{LAST} in {whole} has shape [5, 7]" in refused(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(whole: Path, value: float) -> None:
    with_weights(whole, lambda weights: weights[LAST][3, 4].fill_(value))
    assert f"the weight {LAST}" in refused(whole) and "not finite" in refused(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (LFS, "it is a Git LFS pointer, not the file itself"),
        (b"no such thing as a header", "it is cut off or damaged"),
        (None, "it is cut off or damaged"),
    ],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_file_that_is_not_what_it_should_be_is_named(
    whole: Path, sharded: Path, content: bytes | None, message: str, is_sharded: bool
) -> None:
    directory = sharded if is_sharded else whole
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    assert f"{file} can't be read ({message}" in refused(directory)


def test_a_shard_that_is_missing_or_lacks_what_the_index_says_is_named(sharded: Path) -> None:
    load_base_model(ModelConfig(sharded))
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    kept = second.read_bytes()
    second.unlink()
    assert f"{second} can't be read (it is missing)" in refused(sharded)
    shutil.copy(first, second)
    assert f"{second} lacks the tensor" in refused(sharded)
    second.write_bytes(kept)
    index = sharded / "model.safetensors.index.json"
    for content, message in (("{", "can't be read"), ("{}", "has no weight_map"), ("[]", "no JSON object")):
        index.write_text(content)
        assert message in refused(sharded)
    index.unlink()
    assert "holds neither model.safetensors nor" in refused(sharded)
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    assert "(no safetensors)" in refused(sharded)


def test_a_config_that_is_damaged_or_means_nothing_is_refused(whole: Path) -> None:
    with_config(whole, hidden_size="many")
    assert "can't be loaded as a causal language model" in refused(whole)
    for content, message in (
        (b"", "it is empty"),
        (LFS, "Git LFS"),
        (b"[1]", "no JSON object"),
        (b"{", "config.json"),
    ):
        (whole / "config.json").write_bytes(content)
        assert message in refused(whole)


def test_a_directory_with_an_adapter_is_refused(whole: Path) -> None:
    (whole / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refused(whole)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_quantised_weights_are_refused_by_their_methods_name(
    whole: Path, settings: dict[str, object], method: str
) -> None:
    with_config(whole, quantization_config=settings)
    assert f"are quantised ({method})" in refused(whole) and "dequantise" in refused(whole)
    with_config(whole, quantization_config=None, text_config={"quantization_config": settings})
    assert f"are quantised ({method})" in refused(whole)


def test_quantised_weights_of_which_config_json_says_nothing_are_refused(whole: Path) -> None:
    (whole / "quantize_config.json").write_text("{}")
    assert "are quantised (gptq)" in refused(whole)
    (whole / "quantize_config.json").unlink()
    with_weights(whole, lambda weights: weights.update({LAST: weights[LAST].to(torch.float8_e4m3fn)}))
    assert f"are quantised ({LAST} is F8_E4M3)" in refused(whole)
