"""`twinkle checkpoints merge` against PEFT's merge_and_unload, on models as they are published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import pytest
import tiny_moe
import tiny_qwen3_5
import torch
import transformers
from adapter_files import ROW, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from twinkle import cli
from twinkle.merge import merge
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec

KINDS: dict[str, dict[str, bool]] = {
    "dense": {},
    "tied": {"tied": True},
    "experts": {"experts": True},
    "experts apart": {},  # a Qwen3-MoE, saved by Transformers: a tensor for each matrix of each expert
}


def made(kind: str, directory: Path, **spec: bool) -> tuple[Path, Path, Any]:
    """A model, an adapter that was trained on it, and the log-probabilities of the two."""
    base = directory / "base"
    if kind == "experts apart":
        tiny_moe.save(base)
    else:
        tiny_qwen3_5.save(base, 128, 3, 64, **KINDS[kind])
    backend, state, logprobs = trained(base, AdapterSpec(rank=3, alpha=10.0, **spec))
    adapter = directory / "adapter"
    adapter.mkdir()
    peft_format.write(adapter, state, str(base), backend.info.export)
    return base, adapter, logprobs


def logprobs_of(model: Any) -> Any:
    with torch.no_grad():
        return peft_alone.logprobs(model, ROW)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_adapter_on_its_base(kind: str, tmp_path: Path) -> None:
    base, adapter, expected = made(kind, tmp_path)
    assert cli.main(["checkpoints", "merge", str(base), str(adapter), str(tmp_path / "merged")]) == 0
    published = json.loads((base / "config.json").read_text())["architectures"][0]
    for model_class in (AutoModelForCausalLM, getattr(transformers, published)):
        found = model_class.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        np.testing.assert_allclose(logprobs_of(found), expected, atol=2e-5)
    before, after = (load_file(place / "model.safetensors") for place in (base, tmp_path / "merged"))
    assert after.keys() - before.keys() == ({"lm_head.weight"} if kind == "tied" else set())
    kept = [name for name in before if name.startswith(("model.visual.", "mtp.")) or "norm" in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("kind", ["dense", "experts apart"])
def test_weights_are_those_of_pefts_merge(kind: str, tmp_path: Path) -> None:
    """Of both, where the base is kept in bfloat16, rounded alike."""
    base, adapter, _ = made(kind, tmp_path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merged = load_file(merge(base, adapter, tmp_path / "merged") / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for (name, found), (_, exact) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        # Half of bfloat16's last place, and float32's own rounding.
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), name
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, weights[name])]
    assert any("down_proj" in name for name in changed) and "lm_head.weight" in changed


def test_files_and_their_index_stay_as_they_were(tmp_path: Path) -> None:
    base, adapter, _ = made("dense", tmp_path)
    whole = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(whole)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: whole[name] for name in names if places[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    merged = merge(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in merged.iterdir()) == sorted(path.name for path in base.iterdir())
    assert json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"] == places
    for name, file in places.items():
        assert name in load_file(merged / file)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = made("dense", tmp_path)
    (tmp_path / "other").mkdir()
    other, _, _ = made("experts apart", tmp_path / "other")
    with pytest.raises(InvalidRequest, match="have no model"):
        merge(other, adapter, tmp_path / "merged")
    with pytest.raises(InvalidRequest, match="holds no adapter"):
        merge(base, tmp_path, tmp_path / "merged")
    with pytest.raises(InvalidRequest, match="holds no model"):
        merge(adapter.parent, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert cli.main(["checkpoints", "merge", str(base), str(adapter), str(base)]) == 1
    assert "is there already" in capsys.readouterr().err
