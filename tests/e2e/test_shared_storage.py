"""A real server on PostgreSQL and S3: what it keeps there is whole, survives it, and is another machine's too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import running_server
import torch
from peft_reference import MODEL, peft_loss, peft_model, random_batch
from running_postgresql import RunningPostgresql
from running_s3 import RunningS3
from safetensors.numpy import load_file
from server_processes import CLUSTER, processes_with, times_started_again, wait_for

from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient, TrainingClient

pytestmark = pytest.mark.serve

GREEDY = SamplingParams(max_tokens=4, temperature=0)
PROMPT = [1, 2, 3]
BATCH = random_batch(7, (9, 5))


def train(client: TrainingClient, steps: range) -> None:
    for step in steps:
        client.forward_backward(random_batch(100 + step, (9, 5))).result()
        client.optim_step(learning_rate=1e-2).result()


@pytest.fixture
def machine(
    qwen3_hub_root: Path, tmp_path: Path, postgresql: RunningPostgresql, s3: RunningS3
) -> Iterator[Machines]:
    machines = Machines(qwen3_hub_root, tmp_path, postgresql.new_database(), s3.new_root())
    yield machines
    for server in machines.servers:
        server.stop()
    postgresql.start_if_stopped()


class Machines:
    """Servers with local directories of their own, on one storage."""

    def __init__(self, qwen3_hub_root: Path, directory: Path, database_url: str, root: str) -> None:
        self.root = root
        self.servers: list[running_server.RunningServer] = []
        self._hub_root = qwen3_hub_root
        self._directory = directory
        self._database_url = database_url

    def start(self) -> running_server.RunningServer:
        directory = self._directory / f"machine-{len(self.servers)}"
        directory.mkdir()
        port = running_server.free_port()
        extra = f"  local_root: {directory / 'local'}\n  database_url: {self._database_url}\n  snapshot_seconds: 1\n"
        config = running_server.write_config(directory, port, extra=extra, root=self.root)
        server = running_server.start(config, self._hub_root, port)
        server.storage = directory / "local"
        self.servers.append(server)
        return server


def keys(s3: RunningS3, root: str) -> list[str]:
    """Of all objects, below the root."""
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    found = s3.client().list_objects_v2(Bucket=bucket).get("Contents", [])
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in found]


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_server_on_postgresql_and_s3_loses_nothing(
    qwen3_hub_root: Path, tmp_path: Path, machine: Machines, postgresql: RunningPostgresql, s3: RunningS3
):
    server = machine.start()
    with ServiceClient(server.base_url, api_key="alice") as service, ThreadPoolExecutor() as pool:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        train(client, range(2))
        before = client.save_state("before").result().path

        postgresql.stop()
        during = client.save_state("during")  # its row waits for the database
        asked = pool.submit(
            service.create_rest_client().list_user_checkpoints
        )  # answered 503, and asked again
        train(client, range(2, 3))
        time.sleep(3.0)
        assert not during.done() and not asked.done()
        postgresql.start()
        assert during.result().path.endswith("/during")
        assert [row.checkpoint_id for row in asked.result(60).checkpoints][-1] == "weights/before"

        starts = times_started_again(server)
        [process] = processes_with(server, CLUSTER)
        os.kill(process, signal.SIGKILL)
        wait_for("another start", lambda: times_started_again(server) > starts)
        train(client, range(3, 5))

        same = service.create_lora_training_client(MODEL, rank=4, seed=1)
        train(same, range(5))
        rest = service.create_rest_client()
        after = rest.download_checkpoint(client.save_state("after").result().path, tmp_path / "after")
        undisturbed = rest.download_checkpoint(
            same.save_state("undisturbed").result().path, tmp_path / "same"
        )
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            theirs = load_file(undisturbed / file)
            for name, tensor in load_file(after / file).items():
                np.testing.assert_allclose(tensor, theirs[name], rtol=1e-5, atol=1e-8, err_msg=name)

        model = peft_model(qwen3_hub_root, after)
        assert client.forward(BATCH).metrics["loss:sum"] == pytest.approx(
            peft_loss(model, BATCH).item(), rel=1e-4
        )
        uri = client.save_weights_for_sampler("sampled").result().path
        assert uri is not None
        sampler = service.create_sampling_client(model_path=uri)
        assert list(sampler.sample(PROMPT, 1, GREEDY).sequences[0].tokens) == greedy(model, PROMPT, 4)
        rest.delete_checkpoint(before)
        found = keys(s3, machine.root)  # a session that ends takes its runs' snapshots along

    assert any(key.startswith("live/") and key.endswith(".safetensors") for key in found)
    names = {key.split("/")[3] for key in found if key.startswith("checkpoints/")}
    assert names == {"during", "after", "undisturbed", "sampled"}
    on_disk = {path.name for path in server.storage.iterdir()}
    assert on_disk == {"live", "scratch"}, "neither a database nor checkpoints nor a secret"
    assert "Traceback" not in "".join(server.lines)

    other = machine.start()  # both live now
    with ServiceClient(other.base_url, api_key="alice") as service:
        elsewhere = service.create_sampling_client(model_path=uri)
        assert list(elsewhere.sample(PROMPT, 1, GREEDY).sequences[0].tokens) == greedy(model, PROMPT, 4)
        resumed = service.create_lora_training_client(MODEL, rank=4, seed=9)
        resumed.load_state(client_path(uri, "after")).result()
        assert resumed.forward(BATCH).metrics["loss:sum"] == pytest.approx(
            peft_loss(model, BATCH).item(), rel=1e-4
        )
    with ServiceClient(server.base_url, api_key="alice") as service:
        resumed = service.create_training_client_from_state_with_optimizer(client_path(uri, "after"))
        train(resumed, range(5, 6))
    assert set(keys(s3, machine.root)) >= {key for key in found if key.startswith("checkpoints/")}


def client_path(uri: str, name: str) -> str:
    """Of another checkpoint of the same run."""
    return uri.replace("/sampler_weights/sampled", f"/weights/{name}")
