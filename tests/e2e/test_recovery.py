"""A process of the model is killed under a real server: what its clients see, and what their runs are worth after."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import running_server
from peft_reference import MODEL, random_batch
from safetensors.numpy import load_file
from server_processes import processes_of, times_back, wait_for, wait_for_snapshot

from twinkle.protocol import uris
from twinkle.protocol.errors import RequestFailed
from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

GREEDY = SamplingParams(max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def server(
    hub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running_server.RunningServer]:
    """A server of this module's own, that takes a snapshot after every step, with a gateway beside the engine."""
    directory, port = tmp_path_factory.mktemp("mortal"), running_server.free_port()
    config = running_server.write_config(directory, port, extra="  snapshot_seconds: 0\n", replicas=2)
    server = running_server.start(config, hub_root, port)
    server.storage = directory / "storage"
    yield server
    server.stop()


def kill_the_rank(server: running_server.RunningServer) -> None:
    [rank] = processes_of(server, "ray::Rank")
    os.kill(rank, signal.SIGKILL)


def train(client, seed: int, steps: range) -> None:
    for step in steps:
        client.forward_backward(random_batch(seed + step, (9, 5))).result()
        client.optim_step(learning_rate=1e-2).result()


def saved(server: running_server.RunningServer, client, name: str) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint that is saved now, AdamW's moments too."""
    uri = uris.parse(client.save_state(name).path)
    assert uri.run_id and uri.kind
    directory = server.storage / "checkpoints" / uri.run_id / uri.kind / uri.name
    return load_file(directory / "adapter_model.safetensors") | load_file(directory / "optimizer.safetensors")


def check_same(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert mine.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-8, err_msg=name)


def test_runs_outlive_the_process_of_the_model(server: running_server.RunningServer):
    with (
        ServiceClient(server.base_url, api_key="alice") as alice_service,
        ServiceClient(server.base_url, api_key="bob") as bob_service,
    ):
        alice = alice_service.create_lora_training_client(MODEL, rank=4, seed=1)
        bob = bob_service.create_lora_training_client(MODEL, rank=8, seed=2)
        train(alice, 100, range(3))
        train(bob, 200, range(2))
        wait_for_snapshot(server, alice.model_id, 3)
        wait_for_snapshot(server, bob.model_id, 2)
        prompt = [1, 2, 3]
        sampler = bob.save_weights_and_get_sampling_client()
        before = sampler.sample(prompt, 1, GREEDY).sequences[0].tokens
        alice.forward_backward(random_batch(1, (9, 5))).result()  # a gradient that no step applies
        engines = processes_of(server, "ray::ServeReplica:twinkle:engine")
        backs = times_back(server)

        kill_the_rank(server)
        wait_for("the model", lambda: times_back(server) > backs)

        with pytest.raises(RequestFailed, match=r"set back to its state after optimizer step 3, ") as told:
            alice.optim_step(learning_rate=1e-2).result()
        assert told.value.category == "server"
        train(alice, 100, range(3, 5))
        train(bob, 200, range(2, 4))  # nothing of it was lost: it isn't told
        assert sampler.sample(prompt, 1, GREEDY).sequences[0].tokens == before
        assert processes_of(server, "ray::ServeReplica:twinkle:engine") == engines != set()

        same_as_alice = alice_service.create_lora_training_client(MODEL, rank=4, seed=1)
        same_as_bob = bob_service.create_lora_training_client(MODEL, rank=8, seed=2)
        train(same_as_alice, 100, range(5))
        train(same_as_bob, 200, range(4))
        check_same(saved(server, alice, "after"), saved(server, same_as_alice, "undisturbed"))
        check_same(saved(server, bob, "after"), saved(server, same_as_bob, "undisturbed"))
    said = "".join(server.lines)
    assert "A process of the model ended (rank 0): starting it anew." in said
    assert "2 runs restored, 1 of them set back." in said
    assert "Traceback" not in said


def test_what_is_under_way_when_the_process_is_killed_is_computed_by_the_next_one(
    server: running_server.RunningServer,
):
    with ServiceClient(server.base_url, api_key="carol") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=3)
        sampler = service.create_sampling_client(base_model=MODEL)
        backs = times_back(server)
        long_pass = client.forward_backward(random_batch(1, (255,) * 300))
        long_sample = sampler.sample([1, 2, 3], 8, SamplingParams(max_tokens=200, seed=5))
        time.sleep(1.0)  # for both to begin; if they had ended already, the assertion below says so
        assert not long_pass.done()
        kill_the_rank(server)
        assert len(long_pass.loss_fn_outputs) == 300
        assert len(long_sample.sequences) == 8
        assert times_back(server) == backs + 1
        client.optim_step(learning_rate=1e-2).result()

        undisturbed = service.create_lora_training_client(MODEL, rank=4, seed=3)
        again = undisturbed.forward_backward(random_batch(1, (255,) * 300))
        undisturbed.optim_step(learning_rate=1e-2).result()
        assert again.metrics["loss:sum"] == pytest.approx(long_pass.metrics["loss:sum"], rel=1e-6)
        check_same(saved(server, client, "after"), saved(server, undisturbed, "undisturbed"))


def test_a_killed_gateway_costs_nothing_and_is_replaced(server: running_server.RunningServer):
    gateway_name = "ray::ServeReplica:twinkle:gateway"
    with ServiceClient(server.base_url, api_key="carol") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=3)
        [gateway] = processes_of(server, gateway_name)
        train(client, 300, range(2))
        os.kill(gateway, signal.SIGKILL)
        train(client, 300, range(2, 4))
        killed = saved(server, client, "killed")
        wait_for("another gateway", lambda: len(processes_of(server, gateway_name) - {gateway}) == 1)
        undisturbed = service.create_lora_training_client(MODEL, rank=4, seed=3)
        train(undisturbed, 300, range(4))
        check_same(killed, saved(server, undisturbed, "undisturbed"))
