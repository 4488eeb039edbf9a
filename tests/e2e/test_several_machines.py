"""A server in a Ray cluster of several machines (raylets with addresses of their own), one of which fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import running_server
from peft_reference import MODEL, random_batch
from ray_machines import Machine, RayCluster
from running_postgresql import RunningPostgresql
from server_processes import processes_of, wait_for

from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def cluster(qwen3_hub_root: Path) -> Iterator[RayCluster]:
    """The first machine has room for no rank."""
    cluster = RayCluster.start(qwen3_hub_root, num_cpus=0)
    yield cluster
    cluster.stop()


def config(cluster: RayCluster, directory: Path, port: int, **sections: Any) -> Path:
    return running_server.write_config(
        directory,
        port,
        ray=f'num_gpus: 0, address: "127.0.0.1:{cluster.port}", network_interface: lo',
        **sections,
    )


def ranks_on(machine: Machine) -> set[int]:
    return processes_of(machine, "ray::Rank")


@pytest.mark.timeout(900)
def test_a_server_on_three_machines_goes_on_when_one_is_lost(
    cluster: RayCluster, qwen3_hub_root: Path, tmp_path: Path, postgresql: RunningPostgresql
) -> None:
    """Two ranks on machines of their own, which meet over the network, and a sampler; each machine has a gateway."""
    machines = [cluster.add(f"127.0.0.{number}", num_cpus=1) for number in (11, 12, 13)]
    port = running_server.free_port()
    path = config(
        cluster,
        tmp_path,
        port,
        extra=f"  snapshot_seconds: 0\n  database_url: {postgresql.new_database()}\n",
        layout={"data_parallel_size": 2},
        sampler="{replicas: 1}",
    )
    server = running_server.start(path, qwen3_hub_root, port, more=cluster.environment)
    try:
        assert sorted(len(ranks_on(machine)) for machine in machines) == [0, 1, 1]
        assert sorted(len(processes_of(machine, "ray::SamplerProcess")) for machine in machines) == [0, 0, 1]
        gateways = [processes_of(machine, "ray::ServeReplica") for machine in machines]
        assert [len(found) for found in gateways] == [1, 1, 1]
        with ServiceClient(server.base_url, api_key="ada") as service:
            client = service.create_lora_training_client(MODEL, rank=4, seed=1)
            undisturbed = service.create_lora_training_client(MODEL, rank=4, seed=1)
            for run in (client, undisturbed):
                _train(run, range(2))
            client.forward_backward(random_batch(102, (9, 5))).result()
            spare = cluster.add("127.0.0.14", num_cpus=1)
            lost = next(machine for machine in machines if ranks_on(machine))
            lost.kill()
            client.optim_step(learning_rate=1e-2).result()
            _train(client, range(3, 5))
            _train(undisturbed, range(2, 5))
            assert len(ranks_on(spare)) == 1, "its rank is on the machine that came instead"
            batch = random_batch(50, (12, 7))
            mine, theirs = (run.forward(batch).metrics["loss:sum"] for run in (client, undisturbed))
            assert mine == pytest.approx(theirs, rel=1e-5)
            prompt = batch[0].model_input.to_ints()
            drawn = [
                run.save_weights_and_get_sampling_client().sample(prompt, 1, GREEDY).sequences[0].tokens
                for run in (client, undisturbed)
            ]
            assert drawn[0] == drawn[1]
        wait_for("a gateway there", lambda: len(processes_of(spare, "ray::ServeReplica")) == 1)
    finally:
        server.stop()
    for machine in machines:
        if machine.process.poll() is None:
            wait_for("its end", lambda machine=machine: not processes_of(machine, "ray::ServeReplica"))
            machine.kill()
    spare.kill()


def test_a_cluster_without_room_is_named_with_what_it_has(
    cluster: RayCluster, qwen3_hub_root: Path, tmp_path: Path
) -> None:
    port = running_server.free_port()
    process = running_server.launch(config(cluster, tmp_path, port), qwen3_hub_root, more=cluster.environment)
    _, said = process.communicate(timeout=running_server.START_SECONDS)
    assert process.returncode == 1
    assert "Only this machine of the cluster answers HTTP: others need storage.database_url" in said
    assert "ray.address: the cluster has no room: needed are 1 CPU, each on one machine; free on its" in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")


def test_a_cluster_that_is_not_there_is_named(qwen3_hub_root: Path, tmp_path: Path) -> None:
    port = running_server.free_port()
    path = running_server.write_config(tmp_path, port, ray='address: "127.0.0.1:1"')
    process = running_server.launch(path, qwen3_hub_root)
    _, said = process.communicate(timeout=running_server.START_SECONDS)
    assert process.returncode == 1
    assert "ray.address: no Ray cluster could be joined at 127.0.0.1:1" in said


def _train(client: Any, steps: range) -> None:
    for step in steps:
        client.forward_backward(random_batch(100 + step, (9, 5))).result()
        client.optim_step(learning_rate=1e-2).result()
