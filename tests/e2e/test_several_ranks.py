"""A server whose model is on several ranks, as a user starts it: its clients see no difference."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running_server
import sdk_suite
import torch
from peft_reference import MODEL, peft_logprobs, peft_loss, peft_model, random_batch, trained_parameters
from server_processes import processes_of, times_back, wait_for

from twinkle.protocol import uris
from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

# Copies of the whole model with Transformers, or parts of one; parts of one with Megatron.
LAYOUTS = {
    "DP2": {"data_parallel_size": 2},
    "sharded": {"data_parallel_size": 2, "shard_base": True},
    "TP2": {"tensor_parallel_size": 2},
    "PP2": {"pipeline_parallel_size": 2},
}
# What ranks have to do with, by the SDK as it comes or opened by the patch.
_OF_RANKS = ("test_loop.py", "test_losses.py", "test_sampling.py", "test_training.py")
PARTS = {
    "DP2": ("unpatched or not patched", _OF_RANKS),
    "sharded": ("not unpatched", ("test_loop.py", "test_training.py")),
    "TP2": ("unpatched or not patched", _OF_RANKS),
    "PP2": ("not unpatched", _OF_RANKS),
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(
    layout: str, hub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running_server.RunningServer]:
    """A server of two ranks, that copies runs at once."""
    directory, port = tmp_path_factory.mktemp("ranks"), running_server.free_port()
    config = running_server.write_config(
        directory, port, extra="  snapshot_seconds: 0\n", layout=LAYOUTS[layout]
    )
    server = running_server.start(config, hub_root, port)
    server.storage = directory / "storage"
    yield server
    server.stop()


@pytest.mark.timeout(1200)
def test_the_sdks_suite_passes(layout: str, server: running_server.RunningServer, hub_root: Path) -> None:
    tests, files = PARTS[layout]
    sdk_suite.run(server.base_url, hub_root / MODEL, tests, files)


def test_what_is_trained_on_ranks_is_an_adapter_that_peft_loads(
    server: running_server.RunningServer, hub_root: Path
) -> None:
    batch = random_batch(1, (9, 30, 5))
    with ServiceClient(server.base_url, api_key="ada") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        for _ in range(3):
            client.forward_backward(batch).result()
            client.optim_step(learning_rate=1e-2).result()
        path = client.save_state("trained").path
        outputs = client.forward(batch).loss_fn_outputs
        sampler = client.save_weights_and_get_sampling_client()
        tokens = batch[1].model_input.to_ints()
        sampled = sampler.sample(tokens, 1, SamplingParams(max_tokens=1, temperature=0)).sequences[0]
        uri = uris.parse(path)
        assert uri.run_id and uri.kind
        model = peft_model(hub_root, server.storage / "checkpoints" / uri.run_id / uri.kind / uri.name)
        with torch.no_grad():
            for datum, output in zip(batch, outputs, strict=True):
                found = output["logprobs"].array
                np.testing.assert_allclose(found, peft_logprobs(model, datum), rtol=1e-4, atol=1e-4)
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        assert sampled.tokens == [int(logits.argmax())]
        # And back: the run goes on from the file as PEFT does.
        resumed = service.create_training_client_from_state(path)
        resumed.forward_backward(batch).result()
        norm = resumed.optim_step(learning_rate=0.0).metrics["grad_norm:mean"]
        peft_loss(model, batch).backward()
        gradients: list[Any] = [parameter.grad for parameter in trained_parameters(model).values()]
        assert norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-4)


def test_a_killed_rank_takes_its_group_with_it_and_the_runs_go_on(
    layout: str, server: running_server.RunningServer
) -> None:
    with ServiceClient(server.base_url, api_key="bob") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        undisturbed = service.create_lora_training_client(MODEL, rank=4, seed=1)
        for run in (client, undisturbed):
            _train(run, range(2))
        client.forward_backward(random_batch(102, (9, 5))).result()  # a gradient that no step has applied yet
        ranks, backs = processes_of(server, "ray::Rank"), times_back(server)
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        wait_for("the model", lambda: times_back(server) > backs)
        assert not processes_of(server, "ray::Rank") & ranks
        client.optim_step(learning_rate=1e-2).result()
        _train(client, range(3, 5))
        _train(undisturbed, range(2, 5))
        batch = random_batch(50, (12, 7))
        mine, theirs = (run.forward(batch).metrics["loss:sum"] for run in (client, undisturbed))
        assert mine == pytest.approx(theirs, rel=1e-5)
    said = "".join(server.lines)
    assert "The model was lost (rank " in said


def _train(client: Any, steps: range) -> None:
    for step in steps:
        client.forward_backward(random_batch(100 + step, (9, 5))).result()
        client.optim_step(learning_rate=1e-2).result()
