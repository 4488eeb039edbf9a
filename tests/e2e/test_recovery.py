"""Processes of a real server are killed: clients notice nothing, and their runs are worth what they would have been."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import running_server
from peft_reference import MODEL, random_batch
from safetensors.numpy import load_file
from server_processes import (
    CLUSTER,
    HEAD,
    RAYLET,
    processes_of,
    processes_with,
    times_back,
    times_started_again,
    wait_for,
)

from twinkle.protocol import uris
from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

ENGINE = "ray::ServeReplica:twinkle:engine"
GREEDY = SamplingParams(max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server of this module's own, with a gateway beside the engine, that copies runs seldom."""
    directory = tmp_path_factory.mktemp("mortal")
    return running_server.write_config(
        directory,
        running_server.free_port(),
        extra="  snapshot_seconds: 3600\n",
        replicas=2,
        model_extra="  heartbeat_timeout_seconds: 15\n",
    )


def start(config: Path, qwen3_hub_root: Path) -> running_server.RunningServer:
    port = int(re.findall(r"port: (\d+)", config.read_text(encoding="utf-8"))[0])
    server = running_server.start(config, qwen3_hub_root, port)
    server.storage = config.parent / "storage"
    return server


@pytest.fixture(scope="module")
def server(config: Path, qwen3_hub_root: Path) -> Iterator[running_server.RunningServer]:
    server = start(config, qwen3_hub_root)
    yield server
    server.stop()


def kill_the_rank(server: running_server.RunningServer) -> None:
    [rank] = processes_of(server, "ray::Rank")
    os.kill(rank, signal.SIGKILL)


def stop_the_rank(server: running_server.RunningServer) -> None:
    """It lives on and does nothing, as one that hangs."""
    [rank] = processes_of(server, "ray::Rank")
    os.kill(rank, signal.SIGSTOP)


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


def kill_the_engine(server: running_server.RunningServer) -> None:
    [engine] = processes_of(server, ENGINE)
    os.kill(engine, signal.SIGKILL)
    wait_for("another engine", lambda: len(processes_of(server, ENGINE) - {engine}) == 1)


def kill_what_the_supervisor_replaces(server: running_server.RunningServer, part: str) -> None:
    before = times_started_again(server)
    [process] = processes_with(server, part)
    os.kill(process, signal.SIGKILL)
    wait_for("another start", lambda: times_started_again(server) > before)


def kill_rays_head(server: running_server.RunningServer) -> None:
    kill_what_the_supervisor_replaces(server, HEAD)


def kill_rays_raylet(server: running_server.RunningServer) -> None:
    kill_what_the_supervisor_replaces(server, RAYLET)


def kill_the_servers_process(server: running_server.RunningServer) -> None:
    kill_what_the_supervisor_replaces(server, CLUSTER)


@pytest.mark.parametrize(
    "kill",
    [
        kill_the_rank,
        stop_the_rank,
        kill_the_engine,
        kill_rays_head,
        kill_rays_raylet,
        kill_the_servers_process,
    ],
)
def test_runs_outlive_a_process(
    server: running_server.RunningServer, kill: Callable[[running_server.RunningServer], None]
):
    with (
        ServiceClient(server.base_url, api_key="alice") as alice_service,
        ServiceClient(server.base_url, api_key="bob") as bob_service,
    ):
        alice = alice_service.create_lora_training_client(MODEL, rank=4, seed=1)
        bob = bob_service.create_lora_training_client(MODEL, rank=8, seed=2)
        train(alice, 100, range(3))
        train(bob, 200, range(2))
        prompt = [1, 2, 3]
        sampler = bob.save_weights_and_get_sampling_client()
        before = sampler.sample(prompt, 1, GREEDY).sequences[0].tokens
        alice.forward_backward(random_batch(103, (9, 5))).result()  # a gradient that no step has applied yet

        kill(server)

        alice.optim_step(learning_rate=1e-2).result()
        train(alice, 100, range(4, 5))
        train(bob, 200, range(2, 4))
        assert sampler.sample(prompt, 1, GREEDY).sequences[0].tokens == before

        same_as_alice = alice_service.create_lora_training_client(MODEL, rank=4, seed=1)
        same_as_bob = bob_service.create_lora_training_client(MODEL, rank=8, seed=2)
        train(same_as_alice, 100, range(5))
        train(same_as_bob, 200, range(4))
        check_same(saved(server, alice, "after"), saved(server, same_as_alice, "undisturbed"))
        check_same(saved(server, bob, "after"), saved(server, same_as_bob, "undisturbed"))
    assert "Traceback" not in "".join(server.lines)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_goes_on_when_the_whole_server_has_ended_and_is_started_again(
    qwen3_hub_root: Path, tmp_path: Path, number: signal.Signals
):
    """The SDK's own retries suffice: it is in the midst of a step when the server ends."""
    tinker = pytest.importorskip("tinker")
    config = running_server.write_config(tmp_path, running_server.free_port())
    server = start(config, qwen3_hub_root)
    try:
        with ServiceClient(server.base_url, api_key="alice") as service:
            client = service.create_lora_training_client(MODEL, rank=4, seed=5)
            train(client, 500, range(2))
            sdk = tinker.ServiceClient(base_url=server.base_url, api_key="tml-alice")
            theirs = sdk.create_lora_training_client(MODEL, rank=4, seed=5)
            data = [tinker_datum(tinker, datum) for datum in random_batch(500, (9, 5))]
            theirs.forward_backward(data, "cross_entropy").result()

            began = processes_of(server, "")
            server.stop(number)
            for pid in began if number == signal.SIGKILL else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            port = int(server.base_url.rpartition(":")[2])
            # What was killed is not gone at once where other tests keep the cores busy.
            wait_for("its port to be let go of", lambda: running_server.is_free(port))
            pending = client.forward_backward(random_batch(502, (9, 5)))
            their_step = theirs.optim_step(tinker.AdamParams(learning_rate=1e-2))
            server = start(config, qwen3_hub_root)

            assert pending.metrics["loss:sum"] > 0
            client.optim_step(learning_rate=1e-2).result()
            norm = their_step.result().metrics["grad_norm:mean"]
            after = saved(server, client, "after")
            undisturbed = service.create_lora_training_client(MODEL, rank=4, seed=5)
            first = undisturbed.forward_backward(random_batch(500, (9, 5)))
            assert first.metrics["loss:sum"] > 0
            step = undisturbed.optim_step(learning_rate=1e-2)
            assert step.metrics["grad_norm:mean"] == norm
            train(undisturbed, 500, range(1, 3))
            expected = saved(server, undisturbed, "undisturbed")
            for name in expected:  # each trained alone: to the bit
                np.testing.assert_array_equal(after[name], expected[name], err_msg=name)
    finally:
        server.stop()


def tinker_datum(tinker, datum):
    types = tinker.types
    inputs = {
        name: types.TensorData.from_numpy(tensor.array) for name, tensor in datum.loss_fn_inputs.items()
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.model_input.tokens.tolist()), loss_fn_inputs=inputs
    )
