"""Adapters in the layouts of `twinkle.layouts`, loaded by the programs that each is for.

The base models are of classes that hold more than the text model, as Qwen3.5 is published. Numbers come from
Transformers and PEFT on the same files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import published_models
import pytest
import tiny_moe
import torch
import transformers
from adapter_files import peft_logprobs, trained
from peft import PeftModel
from published_models import MODELS
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from twinkle import layouts
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ExportFacts

FLAGS = {"all": {}, "no head": {"train_unembed": False}, "head": {"train_attn": False, "train_mlp": False}}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: published_models.save(name, tmp_path_factory.mktemp("published")) for name in MODELS}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("name", MODELS)
def test_each_class_loads_its_own_layout(
    name: str, flags: dict[str, bool], model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    spec = AdapterSpec(rank=3, alpha=10.0, **flags)
    backend, state, ours = trained(model_dirs[name], spec)
    assert backend.info.export.tied_head is MODELS[name][1]
    (tmp_path / "peft").mkdir()
    peft_format.write(tmp_path / "peft", state, "org/name", backend.info.export)
    serving = layouts.convert(tmp_path / "peft", tmp_path / "serving", "serving")
    published = json.loads((model_dirs[name] / "config.json").read_text())["architectures"]
    classes = [(AutoModelForCausalLM, tmp_path / "peft"), (getattr(transformers, published[0]), serving)]
    for model_class, files in classes:
        base = model_class.from_pretrained(model_dirs[name], dtype=torch.float32)
        plain, theirs = peft_logprobs(base, files)
        assert (plain - theirs).abs().max() > 0.05, "the adapter was passed over"
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_names_in_the_serving_layout_are_those_of_the_published_weights(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """VLLM renames what begins like the published weights, `model.language_model.`, and passes over all else."""
    name = "Qwen3_5ForConditionalGeneration"
    backend, state, _ = trained(model_dirs[name], AdapterSpec(rank=3))
    peft_format.write(tmp_path, state, "org/name", backend.info.export)
    serving = layouts.convert(tmp_path, tmp_path / "serving", "serving")
    published = load_file(model_dirs[name] / "model.safetensors").keys()
    adapter = load_file(serving / "adapter_model.safetensors").keys()
    assert len(adapter) == len(state.weights)
    for key in adapter:
        assert (
            key.removeprefix("base_model.model.").replace(".lora_A", "").replace(".lora_B", "") in published
        )
    config = json.loads((serving / "adapter_config.json").read_text())
    assert {f"{module}.weight" for module in config["target_modules"]} <= published
    assert sorted(path.name for path in serving.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_tinker_layout_has_three_tensors_of_routed_experts(tmp_path: Path) -> None:
    """Each expert's products are those that PEFT makes of its own layout."""
    model_dir = tiny_moe.save(tmp_path / "model")
    backend, state, _ = trained(model_dir, AdapterSpec(rank=3, alpha=6.0))
    (tmp_path / "peft").mkdir()
    peft_format.write(tmp_path / "peft", state, "org/name", backend.info.export)
    tinker = load_file(
        layouts.convert(tmp_path / "peft", tmp_path / "tinker", "tinker") / "adapter_model.safetensors"
    )
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(base, tmp_path / "peft")
    experts = [m for n, m in peft.named_modules() if n.endswith("layers.0.mlp.experts")][0]
    where = "base_model.model.model.layers.0.mlp.experts"
    assert tinker[f"{where}.w1.lora_A.weight"].shape == (4, 3, 32)
    assert tinker[f"{where}.w1.lora_B.weight"].shape == (4, 16, 3)

    def product(matrix: str) -> Any:
        return 2 * tinker[f"{where}.{matrix}.lora_B.weight"] @ tinker[f"{where}.{matrix}.lora_A.weight"]

    down, gate_up = (wrapper.get_delta_weight("default").numpy() for wrapper in (experts, experts.base_layer))
    np.testing.assert_allclose(product("w2"), down, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([product("w1"), product("w3")], 1), gate_up, atol=1e-6)
    assert not any("base_layer" in name for name in tinker)
    assert {n for n in tinker if "experts" not in n} < set(load_file(tmp_path / "peft" / layouts.WEIGHTS))


def test_what_does_not_say_its_serving_names_is_refused(tmp_path: Path) -> None:
    spec = AdapterSpec(rank=1, train_mlp=False, train_unembed=False)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): np.ones((1, 4), np.float32), name.format("B"): np.ones((6, 1), np.float32)}
    peft_format.write(tmp_path, AdapterState(spec, ["model.layers.0.self_attn.q_proj"], weights), "org/name")
    with pytest.raises(InvalidRequest, match="doesn't say how the class"):
        layouts.convert(tmp_path, tmp_path / "out", "serving")
    with pytest.raises(InvalidRequest, match=r"'vllm' is not one of peft, serving, tinker"):
        layouts.convert(tmp_path, tmp_path / "out", "vllm")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()
    same = layouts.convert(tmp_path, tmp_path / "same", "tinker")
    assert load_file(same / layouts.WEIGHTS).keys() == weights.keys()
    (tmp_path / layouts.WEIGHTS).write_bytes(b"no")
    with pytest.raises(InvalidRequest, match="holds no adapter"):
        layouts.convert(tmp_path, tmp_path / "out", "tinker")


def test_names_are_taken_by_whole_parts(tmp_path: Path) -> None:
    facts = ExportFacts(serving_class="Other", renamed=(("model", "text.model"), ("head", "text.head")))
    metadata = {"serving_class": "Other", "serving_names": json.dumps(facts.renamed)}
    names = {"model.a": "text.model.a", "models.a": "models.a", "head": "text.head", "x.head": "x.head"}
    weights = {f"base_model.model.{n}.lora_A.weight": np.zeros((1, 1), np.float32) for n in names}
    save_file(weights, tmp_path / layouts.WEIGHTS, metadata)
    (tmp_path / layouts.CONFIG).write_text(json.dumps({"r": 1, "target_modules": list(names)}))
    out = layouts.convert(tmp_path, tmp_path / "out", "serving")
    expected = [f"base_model.model.{n}.lora_A.weight" for n in names.values()]
    assert set(load_file(out / layouts.WEIGHTS)) == set(expected)
    assert json.loads((out / layouts.CONFIG).read_text())["target_modules"] == list(names.values())
