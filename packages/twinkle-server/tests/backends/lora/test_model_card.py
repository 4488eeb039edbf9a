"""The README.md of a checkpoint: its lines do what they say."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import published_models
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.lora.model_card import model_card
from twinkle.server.backends.protocol import PLAIN_MODEL, AdamStep, AdapterSpec, ExportFacts, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend


def trained(model_dir: Path, adapter: Path, row: Any, **flags: bool) -> tuple[str, Any]:
    """An adapter in a folder; its README, and the row's log-probabilities under it."""
    backend = TransformersBackend(ModelConfig(model_dir))
    backend.add_adapter("a", AdapterSpec(rank=3, alpha=10.0, **flags))
    for _ in range(2):
        backend.forward_backward([[row]])
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.05))])
    [[after]] = backend.forward_backward([[row]])
    adapter.mkdir()
    state = backend.export_adapter("a", with_optimizer=False)
    peft_format.write(adapter, state, str(model_dir), backend.info.export)
    return (adapter / "README.md").read_text(), after.logprobs


def programs(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


@pytest.fixture
def tied_published_dir(tmp_path: Path) -> Path:
    return published_models.save("Qwen3_5ForConditionalGeneration, tied", tmp_path / "published")


@pytest.mark.parametrize("fixture", ["tiny_tied_model_dir", "tied_published_dir"])
def test_a_tied_head_is_merged_as_the_readme_says(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir: Path = request.getfixturevalue(fixture)
    row = peft_alone.random_row("a", 12, 0, 128)
    readme, ours = trained(model_dir, tmp_path / "adapter", row)
    monkeypatch.chdir(tmp_path / "adapter")
    loading, merging = programs(readme)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrong: Any = PeftModel.from_pretrained(base, ".").merge_and_unload()
        assert (peft_alone.logprobs(wrong, row) - torch.from_numpy(ours)).abs().max() > 0.5
        names: dict[str, Any] = {}
        exec(loading, names)
        np.testing.assert_allclose(peft_alone.logprobs(names["model"], row), ours, atol=1e-5)
        exec(merging, names)
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
        np.testing.assert_allclose(peft_alone.logprobs(merged, row), ours, atol=1e-5)


def test_without_the_head_a_tied_model_is_merged_as_it_is(tiny_tied_model_dir: Path, tmp_path: Path) -> None:
    row = peft_alone.random_row("a", 12, 0, 128)
    readme, ours = trained(tiny_tied_model_dir, tmp_path / "adapter", row, train_unembed=False)
    assert "Merging" not in readme
    base = AutoModelForCausalLM.from_pretrained(tiny_tied_model_dir, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        np.testing.assert_allclose(peft_alone.logprobs(merged, row), ours, atol=1e-5)


def test_notes_are_there_where_they_are_wanted() -> None:
    spec = AdapterSpec(rank=8, alpha=12.5, train_mlp=False)
    plain = model_card(spec, "org/name", PLAIN_MODEL)
    assert plain.startswith(
        "---\nbase_model: org/name\nlibrary_name: peft\n---\n\n# LoRA adapter on org/name\n"
    )
    assert "Rank 8, alpha 12.5, on attention, the output head;" in plain
    assert not any(word in plain for word in ("Merging", "Serving", "experts"))
    assert "base_model:" not in model_card(spec, f"{os.sep}a folder", PLAIN_MODEL)
    renamed = ExportFacts(serving_class="OtherModel", renamed=(("model", "model.language_model"),))
    assert "names OtherModel" in model_card(spec, "org/name", renamed)
    mixture = ExportFacts(has_routed_experts=True)
    assert "experts" in model_card(AdapterSpec(rank=8), "org/name", mixture)
