"""Checkpoint files: PEFT loads what we write, we read it back, and what is wrong is named."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from peft import PeftModel
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    ModelConfig,
    OptimizerState,
    Row,
)
from twinkle.server.backends.transformers import TransformersBackend

NAMES = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.lm_head.lora_A.weight",
)


def small_state() -> AdapterState:
    def matrices(seed: int) -> dict[str, Any]:
        draw = np.random.default_rng(seed)
        shapes = {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 4),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (6, 2),
            "base_model.model.lm_head.lora_A.weight": (2, 4),
            "base_model.model.lm_head.lora_B.weight": (9, 2),
        }
        return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return AdapterState(
        AdapterSpec(rank=2, alpha=12.5, train_mlp=False),
        ["model.layers.0.self_attn.q_proj", "lm_head"],
        matrices(0),
        OptimizerState(7, matrices(1), matrices(2)),
    )


FLAGS = [
    {"train_attn": True, "train_mlp": True, "train_unembed": True},
    {"train_attn": True, "train_mlp": False, "train_unembed": False},
    {"train_attn": False, "train_mlp": True, "train_unembed": False},
    {"train_attn": False, "train_mlp": False, "train_unembed": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=["all", "attn", "mlp", "unembed"])
@pytest.mark.parametrize("model_fixture", ["tiny_model_dir", "tiny_tied_model_dir"])
def test_peft_loads_a_trained_adapter_and_computes_the_same(
    flags: dict[str, bool], model_fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model_dir: Path = request.getfixturevalue(model_fixture)
    backend = TransformersBackend(ModelConfig(model_dir))
    backend.add_adapter("a", AdapterSpec(rank=4, alpha=10.0, **flags))
    tokens = np.arange(20) * 25
    inputs = {"target_tokens": (tokens + 3) % 512, "weights": np.ones(20, np.float32)}
    row = Row("a", tokens, "cross_entropy", inputs)
    [[before]] = backend.forward_backward([[replace(row, forward_only=True)]])
    for _ in range(3):
        backend.forward_backward([[row]])
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.02))])
    [[after]] = backend.forward_backward([[row]])
    assert after.loss < before.loss
    peft_format.write(tmp_path, backend.export_adapter("a", with_optimizer=True), str(model_dir))

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        logits = peft(torch.from_numpy(tokens)[None]).logits[0]
    expected = torch.log_softmax(logits, -1)[torch.arange(20), torch.from_numpy(inputs["target_tokens"])]
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-4)

    read = peft_format.read(tmp_path, with_optimizer=True)
    spec = AdapterSpec(rank=4, alpha=10.0, **flags)
    assert read.spec == spec
    backend.add_adapter("b", spec)
    backend.import_adapter("b", read)
    [[again]] = backend.forward_backward([[replace(row, adapter_id="b")]])
    np.testing.assert_allclose(again.logprobs, after.logprobs, atol=1e-5)


def test_an_adapter_that_peft_saved_can_be_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    )
    model.save_pretrained(str(tmp_path))
    state = peft_format.read(tmp_path, with_optimizer=False)
    assert state.spec == AdapterSpec(rank=3, alpha=6.0, train_mlp=False, train_unembed=False)
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    backend.add_adapter("a", state.spec)
    backend.import_adapter("a", state)
    tokens = np.arange(10)
    inputs = {"target_tokens": tokens, "weights": np.ones(10, np.float32)}
    [[result]] = backend.forward_backward([[Row("a", tokens, "cross_entropy", inputs)]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.from_numpy(tokens)[None]).logits[0], -1)
    np.testing.assert_allclose(result.logprobs, logprobs.diagonal(), atol=1e-5)


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe.save(tmp_path_factory.mktemp("tiny-moe"))


TOKENS = np.arange(20) * 5 % 128
MOE_ROW = Row(
    "a", TOKENS, "cross_entropy", {"target_tokens": (TOKENS + 3) % 128, "weights": np.ones(20, np.float32)}
)


def logprobs_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS)[None]).logits[0]
    return torch.log_softmax(logits, -1)[torch.arange(20), torch.from_numpy((TOKENS + 3) % 128)]


@pytest.mark.parametrize("flags", FLAGS[:3], ids=["all", "attn", "mlp"])
def test_peft_loads_an_adapter_on_routed_experts_and_computes_the_same(
    flags: dict[str, bool], moe_dir: Path, tmp_path: Path
) -> None:
    backend = TransformersBackend(ModelConfig(moe_dir))
    spec = AdapterSpec(rank=3, alpha=10.0, **flags)
    backend.add_adapter("a", spec)
    for _ in range(3):
        backend.forward_backward([[MOE_ROW]])
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.02))])
    [[after]] = backend.forward_backward([[MOE_ROW]])
    state = backend.export_adapter("a", with_optimizer=True)
    peft_format.write(tmp_path, state, str(moe_dir))

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    experts = [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")]
    assert config["target_parameters"] == (experts if flags["train_mlp"] else None)
    assert not set(experts) & set(config["target_modules"])
    base = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32)
    plain = logprobs_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what PEFT says of matrices that it misses
        peft = PeftModel.from_pretrained(base, tmp_path)
    expected = logprobs_of(peft)
    assert (plain - expected).abs().max() > 0.1
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-5)

    read = peft_format.read(tmp_path, with_optimizer=True)
    assert read.spec == spec and set(read.target_modules) == set(state.target_modules)
    assert read.optimizer is not None and state.optimizer is not None
    for found, wanted in (
        (read.weights, state.weights),
        (read.optimizer.exp_avg, state.optimizer.exp_avg),
        (read.optimizer.exp_avg_sq, state.optimizer.exp_avg_sq),
    ):
        assert set(found) == set(wanted)
        assert all(np.array_equal(found[name], matrix) for name, matrix in wanted.items())
    backend.add_adapter("b", spec)
    backend.import_adapter("b", read)
    [[again]] = backend.forward_backward([[replace(MOE_ROW, adapter_id="b")]])
    assert np.array_equal(again.logprobs, after.logprobs)


def peft_on_experts(moe_dir: Path, modules: list[str], parameters: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32)
    settings: dict[str, Any] = {"target_modules": modules, "target_parameters": parameters}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **settings))


@pytest.mark.parametrize(
    "modules", [[], ["q_proj", "k_proj", "v_proj", "o_proj"]], ids=["experts", "and attention"]
)
def test_an_adapter_on_routed_experts_that_peft_saved_can_be_read(
    modules: list[str], moe_dir: Path, tmp_path: Path
) -> None:
    model = peft_on_experts(moe_dir, modules, ["mlp.experts.down_proj", "experts.gate_up_proj"])
    model.save_pretrained(str(tmp_path))
    state = peft_format.read(tmp_path, with_optimizer=False)
    assert state.spec == AdapterSpec(rank=3, alpha=6.0, train_attn=bool(modules), train_unembed=False)
    backend = TransformersBackend(ModelConfig(moe_dir))
    backend.add_adapter("a", state.spec)
    backend.import_adapter("a", state)
    [[result]] = backend.forward_backward([[MOE_ROW]])
    np.testing.assert_allclose(result.logprobs, logprobs_of(model), atol=1e-5)


def test_an_adapter_that_lacks_routed_experts_is_refused_where_they_are_trained(
    moe_dir: Path, tmp_path: Path
) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for i, parameters in enumerate(([], ["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"])):
        directory = tmp_path / str(i)
        peft_on_experts(moe_dir, attention, parameters).save_pretrained(str(directory))
        state = peft_format.read(directory, with_optimizer=False)
        backend = TransformersBackend(ModelConfig(moe_dir))
        backend.add_adapter("a", AdapterSpec(rank=3, train_unembed=False))
        with pytest.raises(InvalidRequest, match=r"saved adapter lacks model\.layers\.0\.mlp\.experts"):
            backend.import_adapter("a", state)
        if not parameters:
            backend.add_adapter("b", AdapterSpec(rank=3, train_mlp=False, train_unembed=False))
            backend.import_adapter("b", state)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "would be of model.layers.0.mlp.experts.gate_up_proj, which is not among"),
        (["mlp.experts.down_proj"], "would be of model.layers.0.mlp.experts.gate_up_proj"),
        ("mlp.experts.down_proj", "must be a list of names"),
        ([3], "must be a list of names"),
    ],
)
def test_target_parameters_that_do_not_fit_the_matrices_are_named(
    parameters: object, message: str, moe_dir: Path, tmp_path: Path
) -> None:
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft_on_experts(moe_dir, [], both).save_pretrained(str(tmp_path))
    edit_config(target_parameters=parameters)(tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        peft_format.read(tmp_path, with_optimizer=False)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    state = small_state()
    peft_format.write(tmp_path, state, "org/name")
    read = peft_format.read(tmp_path, with_optimizer=True)
    assert read.spec == state.spec and set(read.target_modules) == set(state.target_modules)
    assert read.optimizer is not None and state.optimizer is not None and read.optimizer.step == 7
    for found, expected in (
        (read.weights, state.weights),
        (read.optimizer.exp_avg, state.optimizer.exp_avg),
        (read.optimizer.exp_avg_sq, state.optimizer.exp_avg_sq),
    ):
        assert set(found) == set(expected)
        assert all(np.array_equal(found[name], matrix) for name, matrix in expected.items())
    assert peft_format.read(tmp_path, with_optimizer=False).optimizer is None
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 12.5, "org/name")


def test_an_optimizer_that_was_not_saved_is_named(tmp_path: Path) -> None:
    peft_format.write(tmp_path, replace(small_state(), optimizer=None), "org/name")
    assert not (tmp_path / "optimizer.safetensors").exists()
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        peft_format.read(tmp_path, with_optimizer=True)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        weights = small_state().weights
        change(weights)
        save_file(weights, directory / "adapter_model.safetensors")

    return edit


def edit_optimizer(metadata: dict[str, str], drop: str = "") -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        optimizer = small_state().optimizer
        assert optimizer is not None
        moments = {f"exp_avg.{name}": m for name, m in optimizer.exp_avg.items()}
        moments |= {f"exp_avg_sq.{name}": m for name, m in optimizer.exp_avg_sq.items()}
        moments.pop(drop, None)
        save_file(moments, directory / "optimizer.safetensors", metadata)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: can't be read"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "must be a JSON object"),
        (edit_config(use_dora=True), "use_dora = True is not supported"),
        (edit_config(peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
        (edit_config(rank_pattern={"q_proj": 3}), "rank_pattern"),
        (edit_config(r=0), "r = 0"),
        (edit_config(r=3), "says rank 3"),
        (edit_config(lora_alpha=-1), "lora_alpha = -1"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04."), "can't be read"),
        (edit_weights(lambda w: w.pop(NAMES[0])), "one matrix lora_A and one lora_B"),
        (edit_weights(lambda w: w.update(bias=w[NAMES[0]])), "bias is neither lora_A nor lora_B"),
        (edit_weights(lambda w: w.update({NAMES[0]: w[NAMES[0]].astype(np.int32)})), "is int32"),
        (edit_weights(lambda w: w.update({NAMES[1]: np.zeros((3, 4), np.float32)})), "says rank 2"),
        (edit_weights(lambda w: w.clear()), "no matrices"),
        (edit_optimizer({"step": "seven"}), "found 'seven'"),
        (edit_optimizer({}), "must have a step"),
        (edit_optimizer({"step": "7"}, drop=f"exp_avg_sq.{NAMES[0]}"), "exp_avg_sq: the saved adapter lacks"),
    ],
)
def test_damaged_files_are_refused_by_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    peft_format.write(tmp_path, small_state(), "org/name")
    damage(tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        peft_format.read(tmp_path, with_optimizer=True)
