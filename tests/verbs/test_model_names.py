"""By what name a base model goes in checkpoints and replies, however the server and its clients spell it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.config import parse_config
from twinkle.server.local import ServiceClient

TOKENS = [5, 6, 7, 8]


def connect(model_id: str, storage: Path) -> ServiceClient:
    config = {
        "model": {"model_id": model_id, "torch_dtype": "float32"},
        "ray": {"num_gpus": 0},
        "storage": {"root": str(storage)},
    }
    return ServiceClient(parse_config(config))


def export(client, base_model: str, target: Path) -> tuple[Path, np.ndarray]:
    """Train an adapter a little; its files, and the log-probabilities of TOKENS[1:]."""
    training = client.create_lora_training_client(base_model, rank=2, seed=0, train_unembed=False)
    inputs = {"target_tokens": TOKENS[1:], "weights": [1.0, 1.0, 1.0]}
    datum = Datum(model_input=ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)
    training.forward_backward([datum])
    training.optim_step(learning_rate=0.05)
    logprobs = training.forward([datum], "cross_entropy").loss_fn_outputs[0]["logprobs"].to_numpy()
    rest = client.create_rest_client()
    return rest.download_checkpoint(training.save_weights_external("out").result().path, target), logprobs


def check_replies(client, name: str) -> None:
    [model] = client.get_server_capabilities().supported_models
    assert model.model_name == name
    rest = client.create_rest_client()
    [run, *_] = rest.list_training_runs().training_runs
    assert run.base_model == name
    assert client.create_sampling_client(base_model=name).get_base_model() == name
    training = client.create_lora_training_client(name, rank=2)
    info = training.get_info()
    assert (info.model_data.model_name, info.model_data.tokenizer_id, info.model_name) == (name,) * 3
    assert rest.get_weights_info(training.save_state("named", overwrite=True).path).base_model == name


@pytest.mark.parametrize("spelled", ["{}/", "file://{}"])
def test_a_folder_is_a_path(spelled: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-model"
    shutil.copytree(tiny_model_dir, folder)
    client = connect(f"file://{quote(str(folder))}".replace("-", "%2D"), tmp_path / "storage")
    with pytest.raises(InvalidRequest, match="not the configured model"):
        client.create_lora_training_client("org/tiny-model", rank=2)
    files, ours = export(client, spelled.format(folder), tmp_path / "out")
    check_replies(client, str(folder))
    client.close()
    config = json.loads((files / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(files, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS[:-1]])).logits[0]
    theirs = torch.log_softmax(logits, -1)[torch.arange(3), TOKENS[1:]]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


PROGRAM = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
print(torch.log_softmax(logits, -1)[torch.arange(3), [6, 7, 8]].tolist())
"""


def huggingface_cache(home: Path, repository: str, files: Path) -> Path:
    """HF_HOME as if the repository had been downloaded before."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(files, place / "snapshots" / "0")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    return home


@pytest.mark.parametrize("scheme", ["ms://", "hf://", ""])
def test_a_repository_is_what_loaders_know_it_by(
    scheme: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are loaded by a program of its own that has nothing but Hugging Face's cache."""
    shutil.copytree(tiny_model_dir, tmp_path / "root" / "tiny" / "qwen3")
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path / "root"))
    client = connect(f"{scheme}tiny/qwen3", tmp_path / "storage")
    for spelled in ("ms://tiny/qwen3", "hf://tiny/qwen3", "tiny/qwen3", f"{scheme}tiny/qwen3"):
        client.create_sampling_client(base_model=spelled)
    files, ours = export(client, "ms://tiny/qwen3", tmp_path / "out")
    check_replies(client, "tiny/qwen3")
    client.close()
    home = huggingface_cache(tmp_path / "home", "tiny/qwen3", tiny_model_dir)
    environment = {k: v for k, v in os.environ.items() if k != "TWINKLE_HUB_ROOT"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(files)],
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    np.testing.assert_allclose(ours, json.loads(done.stdout), atol=1e-5)


def test_what_was_saved_under_a_hubs_name_goes_on(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a database of an earlier version have the id as the configuration spelled it."""
    from sqlalchemy import create_engine, text

    shutil.copytree(tiny_model_dir, tmp_path / "root" / "tiny" / "qwen3")
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path / "root"))
    client = connect("ms://tiny/qwen3", tmp_path / "storage")
    training = client.create_lora_training_client("ms://tiny/qwen3", rank=2)
    path = training.save_state("old").path
    client.close()
    [database] = (tmp_path / "storage").glob("*.sqlite*")
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        for table in ("runs", "checkpoints"):
            connection.execute(text(f"UPDATE {table} SET base_model = 'ms://tiny/qwen3'"))
    engine.dispose()

    client = connect("hf://tiny/qwen3", tmp_path / "storage")
    client.create_sampling_client(base_model="tiny/qwen3")
    rest = client.create_rest_client()
    assert rest.get_weights_info(path).base_model == "tiny/qwen3"
    assert [run.base_model for run in rest.list_training_runs().training_runs] == ["tiny/qwen3"]
    client.create_training_client_from_state_with_optimizer(path)
    client.create_lora_training_client("tiny/qwen3", rank=2).load_state(path).result()
    client.create_sampling_client(model_path=path)
    client.close()
