"""The mission's second configuration as it stands: Qwen3.5-72B on Megatron, four ranks to a layer, two stages.

Eight ranks on a CPU, with a tiny model of that architecture under that name, and a sampler of its own: no rank holds the
whole model. Only the address is another.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import running_server
import tiny_qwen3_5
import tinker
import torch
from peft import PeftModel
from peft_reference import peft_logprobs, random_batch
from server_processes import processes_of
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient, TrainingClient

pytestmark = pytest.mark.serve

MODEL = "Qwen/Qwen3.5-72B"
YAML = """\
model:
  model_id: Qwen/Qwen3.5-72B
  use_megatron: true
  torch_dtype: bfloat16
  tensor_parallel_size: 4
  pipeline_parallel_size: 2
server:
  host: 0.0.0.0
  port: 8000
ray:
  num_gpus: 8
"""
BATCH = random_batch(5, (9, 17, 3))
CPU = {"TWINKLE_DEVICE": "cpu"}


@pytest.fixture
def hub(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A hub root with the tiny 72B in it."""
    directory = tmp_path / "hub" / MODEL
    directory.mkdir(parents=True)
    tiny_qwen3_5.save(directory, 512, 0, 4096, tensor_parallel_size=4)
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, directory)
    return tmp_path / "hub"


def start(tmp_path: Path, hub: Path, text: str) -> running_server.RunningServer:
    port = running_server.free_port()
    config = tmp_path / "server_config.yaml"
    here = text.replace("host: 0.0.0.0\n  port: 8000", f"host: 127.0.0.1\n  port: {port}")
    config.write_text(f"{here}storage: {{root: {tmp_path / 'storage'}}}\n", encoding="utf-8")
    return running_server.start(config, hub, port, more=CPU)


def step(client: TrainingClient) -> list[np.ndarray]:
    """Log-probabilities before the step."""
    passed = client.forward_backward(BATCH)
    client.optim_step(learning_rate=1e-2).result()
    return [each["logprobs"].array for each in passed.result().loss_fn_outputs]


@pytest.mark.timeout(900)
def test_it_starts_trains_two_tenants_samples_saves_and_goes_on_with_transformers(
    tmp_path: Path, hub: Path
) -> None:
    prompt = BATCH[1].model_input.to_ints()
    # float32 for what is compared; the file's bfloat16 is started too, below.
    exact = YAML.replace("bfloat16", "float32")
    server = start(tmp_path, hub, exact)
    try:
        assert len(processes_of(server, "ray::Rank")) == 8
        assert len(processes_of(server, "ray::SamplerProcess")) == 1
        with ServiceClient(server.base_url, api_key="ada") as service:
            client = service.create_lora_training_client(MODEL, rank=4, seed=1)
            sdk = tinker.ServiceClient(base_url=server.base_url, api_key="tml-grace")
            other = sdk.create_lora_training_client(MODEL, rank=2, seed=2).result()
            first = step(client)
            datum = tinker.Datum(
                model_input=tinker.ModelInput.from_ints(prompt),
                loss_fn_inputs={
                    name: tinker.TensorData.from_numpy(tensor.array)
                    for name, tensor in BATCH[1].loss_fn_inputs.items()
                },
            )
            theirs = other.forward_backward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
            # Both adapters begin as nothing: the base model's own.
            np.testing.assert_allclose(theirs.to_numpy(), first[1], atol=1e-5)
            other.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
            second = step(client)
            assert all(not np.allclose(a, b, atol=1e-3) for a, b in zip(first, second, strict=True))
            path = client.save_state("half").result().path
            sampler = client.save_weights_and_get_sampling_client()
            sample = sampler.sample(prompt, 1, SamplingParams(max_tokens=8, temperature=0)).sequences[0]
            weights = client.save_weights_for_sampler("adapter").result().path
            adapter = service.create_rest_client().download_checkpoint(weights, tmp_path / "adapter")
            third = step(client)
    finally:
        server.stop()
    # What PEFT makes of the adapter says the same as the ranks, and as the sampler.
    base = AutoModelForCausalLM.from_pretrained(hub / MODEL, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, adapter).eval()
    for datum, got in zip(BATCH, third, strict=True):
        np.testing.assert_allclose(peft_logprobs(plain, datum).detach(), got, atol=1e-4)
    drawn = plain.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert sample.tokens == drawn[0, len(prompt) :].tolist()
    single = exact.replace("use_megatron: true", "use_megatron: false")
    single = single.replace("  tensor_parallel_size: 4\n  pipeline_parallel_size: 2\n", "")
    server = start(tmp_path, hub, single.replace("num_gpus: 8", "num_gpus: 0"))
    try:
        with ServiceClient(server.base_url, api_key="ada") as service:
            resumed = service.create_training_client_from_state_with_optimizer(path)
            for got, expected in zip(step(resumed), third, strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-4)
    finally:
        server.stop()


@pytest.mark.timeout(600)
def test_it_runs_word_for_word_in_bfloat16(tmp_path: Path, hub: Path) -> None:
    server = start(tmp_path, hub, YAML)
    try:
        assert "computing on the CPU" in "".join(server.lines)
        with ServiceClient(server.base_url, api_key="ada") as service:
            client = service.create_lora_training_client(MODEL, rank=4, seed=1)
            before, after = step(client), step(client)
            assert all(np.isfinite(each).all() for each in (*before, *after))
            assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    finally:
        server.stop()
