"""Methods of the SDK's clients that the other tests have no need of."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tinker
from tinker import types
from tinker_sdk import MODEL, now


def test_a_training_client_makes_sampling_clients_of_its_checkpoints(train, sdk):
    client = train()
    path = client.save_weights_for_sampler("for-a-sampler").result().path
    sampler = now(client.create_sampling_client(sdk.path(path)))
    prompt = types.ModelInput.from_ints([1, 2, 3])
    assert len(sampler.compute_logprobs(prompt).result()) == 3


def test_console_addresses_and_telemetry_ask_nothing_of_the_server(service, train):
    client = train()
    session_id, kind, _ = client.model_id.split(":")
    assert kind == "train"
    assert service.get_console_url().endswith(f"/{session_id}")
    assert client.get_console_url().endswith(f"/{client.model_id}")
    for each in (service, client):
        each.get_telemetry()


async def test_the_asynchronous_twins(service):
    client = await service.create_lora_training_client_async(base_model=MODEL, rank=2)
    inputs = {
        "target_tokens": types.TensorData(data=[2, 3], dtype="int64", shape=[2]),
        "weights": types.TensorData(data=[1.0, 1.0], dtype="float32", shape=[2]),
    }
    data = [types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)]
    passed = await client.forward_backward_async(data, "cross_entropy")
    stepped = await client.optim_step_async(types.AdamParams(learning_rate=0.01))
    assert (await passed).metrics["loss:sum"] > 0
    assert (await stepped).metrics["grad_norm:mean"] > 0
    saved = await (await client.save_state_async("from-async"))
    resumed = await service.create_training_client_from_state_async(saved.path)
    assert (await (await resumed.forward_async(data, "cross_entropy"))).metrics["loss:sum"] > 0
    sampler = await client.save_weights_and_get_sampling_client_async()
    sampled = await asyncio.gather(
        *(
            sampler.sample_async(types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=2))
            for _ in range(3)
        )
    )
    assert all(len(response.sequences[0].tokens) >= 1 for response in sampled)


def test_what_happens_in_a_program_is_reported_and_dropped(base_url: str, tmp_path: Path):
    """Telemetry on: an exception of the program comes at once, and the server keeps nothing of it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import tinker\n"
        "client = tinker.ServiceClient()\n"
        f"made = client.create_lora_training_client({MODEL!r}, rank=2)\n"
        "made = made.result() if hasattr(made, 'result') else made\n"
        "raise RuntimeError('of the program itself')\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        env={**kept, "TINKER_BASE_URL": base_url, "TINKER_API_KEY": "tml-telemetry", "TINKER_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "of the program itself" in done.stderr


def test_tokenizers_come_from_the_server_where_there_is_no_hub(sdk, train, monkeypatch: pytest.MonkeyPatch):
    if not sdk.patched:
        pytest.skip("the SDK as it comes asks the hub alone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TWINKLE_HUB_ROOT", raising=False)
    tokenizer = train().get_tokenizer()
    assert tokenizer.encode("Hi") == [72, 105], "a token is a byte"


def test_the_sdk_alone_finds_the_tokenizer_by_the_models_name(base_url: str, model_dir: Path, tmp_path: Path):
    """In Hugging Face's cache; the server's configuration has the id with a hub before it."""
    cached = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(model_dir, cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    program = (
        "import tinker\n"
        "client = tinker.ServiceClient()\n"
        f"made = client.create_lora_training_client({MODEL!r}, rank=2)\n"
        "made = made.result() if hasattr(made, 'result') else made\n"
        "print('tokens', made.get_tokenizer().encode('Hi'))\n"
    )
    kept = {k: v for k, v in os.environ.items() if k != "TWINKLE_HUB_ROOT" and not k.startswith("TINKER_")}
    own = {"TINKER_BASE_URL": base_url, "TINKER_API_KEY": "tml-tokenizer", "TINKER_TELEMETRY": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=kept | own | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "tokens [72, 105]" in done.stdout, done.stderr


def test_an_unknown_key_finds_nothing_of_others(sdk, train):
    client = train()
    stranger = tinker.ServiceClient(base_url=sdk.base_url, api_key="tml-stranger").create_rest_client()  # pyright: ignore
    with pytest.raises(tinker.NotFoundError):
        stranger.get_training_run(client.model_id).result()
    assert stranger.list_user_checkpoints().result().checkpoints == []
