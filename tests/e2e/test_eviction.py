"""A real server with room for one adapter: runs of both clients take turns on it, and none of them can tell."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import running_server
from peft_reference import MODEL, random_batch
from server_processes import processes_of, times_back, wait_for

from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve


@pytest.fixture
def server(
    hub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running_server.RunningServer]:
    directory, port = tmp_path_factory.mktemp("small"), running_server.free_port()
    config = running_server.write_config(
        directory,
        port,
        extra="  snapshot_seconds: 3600\n",
        model_extra="  max_resident_adapter_bytes: 1\n",
    )
    server = running_server.start(config, hub_root, port)
    server.storage = directory / "storage"
    yield server
    server.stop()


def evicted(server: running_server.RunningServer) -> set[str]:
    """Runs with a copy on disk: they had to make room, since no copy is taken by the clock."""
    return {path.parent.name for path in (server.storage / "live").glob("*/runs/*/*.safetensors")}


def round_of(client, seed: int) -> float:
    client.forward_backward(random_batch(seed, (9, 5)))
    client.forward_backward(random_batch(seed + 1, (7,))).result()
    return client.optim_step(learning_rate=1e-2).metrics["grad_norm:mean"]


def test_runs_that_take_turns_train_as_if_they_were_alone_and_lose_nothing_with_the_process(
    server: running_server.RunningServer,
):
    with ServiceClient(server.base_url, api_key="alice") as service:
        runs = [service.create_lora_training_client(MODEL, rank=4, seed=seed) for seed in range(3)]
        norms = [[round_of(run, 10 * i + step) for i, run in enumerate(runs)] for step in range(2)]
        for i, run in enumerate(runs):  # a gradient that goes to disk and comes back
            run.forward_backward(random_batch(i, (9, 5))).result()
        assert evicted(server) >= {run.model_id for run in runs[:2]}

        backs = times_back(server)
        [rank] = processes_of(server, "ray::Rank")
        os.kill(rank, signal.SIGKILL)
        wait_for("the model", lambda: times_back(server) > backs)
        pending = [run.optim_step(learning_rate=1e-2) for run in runs]
        norms.append([step.metrics["grad_norm:mean"] for step in pending])

        for i in range(3):
            alone = service.create_lora_training_client(MODEL, rank=4, seed=i)
            expected = [round_of(alone, 10 * i + step) for step in range(2)]
            alone.forward_backward(random_batch(i, (9, 5)))
            expected.append(alone.optim_step(learning_rate=1e-2).metrics["grad_norm:mean"])
            alone.unload().result()
            assert [of_step[i] for of_step in norms] == pytest.approx(expected, rel=1e-5)
        for run in runs:
            run.unload().result()
        wait_for("the files to go", lambda: not evicted(server))
