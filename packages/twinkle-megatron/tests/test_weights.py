"""Of a checkpoint each rank reads its own part, in whatever form the experts are on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_ranks
import peft_alone
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.contract.parts import assert_near
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle_megatron.architecture import read_hf_config


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {"tensor_parallel_size": 2}),
        ("qwen2", {"pipeline_parallel_size": 2}),
        ("qwen2", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("qwen3_moe", {"expert_parallel_size": 2}),
        ("qwen3_5", {"tensor_parallel_size": 2}),
        ("qwen3_5_moe", {"expert_parallel_size": 2}),
    ],
)
def test_no_rank_ever_holds_the_whole_model(
    family: str, layout: dict[str, Any], model: Callable[[str], Path]
) -> None:
    """It keeps its share of what is shared out and what isn't; of the files it reads no more than that."""
    config = ModelConfig(model(family), **layout)
    tensors = load_file(model(family) / "model.safetensors").items()
    sizes = {name: t.numel() for name, t in tensors if ".visual." not in name}
    whole = sum(sizes.values())
    # Of a mixture only the experts are shared out; every rank has the attention.
    shared = sum(size for name, size in sizes.items() if "moe" not in family or ".experts." in name)
    most = whole - 0.45 * shared
    with megatron_ranks.start(config) as group:
        held, read, largest = zip(*group.held_by_each_rank(), strict=True)
    for elements in (held, read):
        assert max(elements) < most
        assert sum(elements) >= whole
    assert max(largest) < 0.3 * whole


def test_experts_may_be_stacked_on_disk(model: Callable[[str], Path], tmp_path: Path) -> None:
    """As Transformers 5 has them in memory, and as it saves them: one tensor for each."""
    import torch

    source = model("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    assert name.format(0, 0, "gate") in tensors
    for layer in range(2):
        parts = {
            part: torch.stack([tensors.pop(name.format(layer, e, part)) for e in range(4)])
            for part in ("gate", "up", "down")
        }
        prefix = f"model.layers.{layer}.mlp.experts"
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]
    for file in source.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).symlink_to(file)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rows = [peft_alone.random_row("a", 20, i, VOCAB_SIZE) for i in range(3)]
    found: list[Any] = []
    for path in (source, tmp_path):
        with megatron_ranks.start(ModelConfig(path, expert_parallel_size=2)) as group:
            backend = group.backend()
            backend.add_adapter("a", AdapterSpec(rank=2))
            found.append(backend.forward_backward([rows]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert_near(one.logprobs, other.logprobs, 0.0)


def test_of_a_model_that_sees_and_predicts_further_tokens_the_text_model_is_read(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    """By its names as a part of that model, as it is published, and by its own, as it is saved alone."""
    import torch

    published, alone = (shutil.copytree(model("qwen3_5"), tmp_path / name) for name in ("published", "alone"))
    tensors = load_file(published / "model.safetensors")
    assert "model.language_model.norm.weight" in tensors and "model.visual.pos_embed.weight" in tensors
    further = {
        f"mtp.{name}.weight": torch.full((4, 4), float("nan")) for name in ("fc", "layers.0.mlp.up_proj")
    }
    save_file({**tensors, **further}, published / "model.safetensors", metadata={"format": "pt"})
    text = {
        name.replace("language_model.", ""): tensor
        for name, tensor in tensors.items()
        if ".visual." not in name
    }
    save_file(text, alone / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config["text_config"]))
    rows = [peft_alone.random_row("a", 20, i, VOCAB_SIZE) for i in range(2)]
    found: list[Any] = []
    for path in (published, alone):
        with megatron_ranks.start(ModelConfig(path)) as group:
            backend = group.backend()
            backend.add_adapter("a", AdapterSpec(rank=2))
            assert backend.info.architecture == "Qwen3_5ForCausalLM"
            found.append(backend.forward_backward([rows]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert_near(one.logprobs, other.logprobs, 0.0)


EMBEDDING = "model.embed_tokens.weight"
LAST = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(LAST), f"no file in it holds {LAST}"),
        (lambda tensors: tensors.pop("model.norm.weight"), "no file in it holds model.norm.weight"),
        (lambda tensors: tensors[LAST][0, 0].fill_(float("nan")), f"{LAST} in .* not finite"),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": tensors[LAST].clone()}),
            "are 2 layers",
        ),
        (lambda tensors: tensors.update({LAST: tensors[LAST][:5].clone()}), f"{LAST} give"),
        (lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][1:].clone()}), f"{EMBEDDING} give"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_the_tensors_name(
    change: Callable[[dict[str, Any]], object], message: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(model("qwen3"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match=message):
        megatron_ranks.start(ModelConfig(directory))


def test_a_directory_that_is_no_base_model_is_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(model("qwen3"), tmp_path / "model")
    weights, config = directory / "model.safetensors", directory / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-10])
    with pytest.raises(InvalidRequest, match="it is cut off or damaged"):
        read_hf_config(ModelConfig(directory))
    weights.write_bytes(whole)
    config.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InvalidRequest, match="quantised .gptq."):
        read_hf_config(ModelConfig(directory))
    config.write_text(json.dumps(settings | {"hidden_size": "many"}))
    with pytest.raises(InvalidRequest, match="config.json can't be read"):
        read_hf_config(ModelConfig(directory))
    config.write_text(json.dumps(settings))
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="holds an adapter"):
        read_hf_config(ModelConfig(directory))
