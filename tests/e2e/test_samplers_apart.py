"""Servers whose samplers have processes of their own, and one without samplers, as users start them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import running_server
import sdk_suite
import tinker
from peft_reference import MODEL, random_batch
from server_processes import processes_of, wait_for

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def server(
    hub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running_server.RunningServer]:
    """One rank that trains, and two samplers."""
    directory, port = tmp_path_factory.mktemp("samplers"), running_server.free_port()
    config = running_server.write_config(directory, port, sampler="{replicas: 2}")
    server = running_server.start(config, hub_root, port)
    yield server
    server.stop()


@pytest.mark.timeout(600)
def test_the_sdks_suite_of_sampling_passes(
    server: running_server.RunningServer, mission_model_dir: Path
) -> None:
    assert len(processes_of(server, "ray::SamplerProcess")) == 2
    sdk_suite.run(server.base_url, mission_model_dir, sdk_suite.UNPATCHED, sdk_suite.SAMPLING)


def test_a_killed_sampler_is_replaced_and_no_client_notices(server: running_server.RunningServer) -> None:
    prompt = random_batch(3, (6,))[0].model_input.to_ints()
    with ServiceClient(server.base_url, api_key="ada") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        client.forward_backward(random_batch(1, (9, 7))).result()
        client.optim_step(learning_rate=1e-2).result()
        sampler = client.save_weights_and_get_sampling_client()
        expected = sampler.sample(prompt, 1, GREEDY).sequences[0].tokens
        running = processes_of(server, "ray::SamplerProcess")
        for victim in sorted(running):
            samples = [sampler.sample(prompt, 4, GREEDY) for _ in range(8)]
            os.kill(victim, signal.SIGKILL)
            client.forward_backward(random_batch(1, (9, 7))).result()  # training knows nothing of it
            for sample in samples:
                assert [sequence.tokens for sequence in sample.result().sequences] == [expected] * 4
        wait_for("both samplers", lambda: len(processes_of(server, "ray::SamplerProcess") - running) == 2)
        assert sampler.sample(prompt, 1, GREEDY).sequences[0].tokens == expected
    wait_for("the log", lambda: "Sampler 1 is back." in "".join(server.lines))
    assert not [line for line in server.lines if "The model was lost" in line]


@pytest.mark.timeout(600)
def test_samples_that_are_too_many_for_one_sampler_bring_a_second_one(hub_root: Path, tmp_path: Path) -> None:
    port = running_server.free_port()
    config = running_server.write_config(
        tmp_path,
        port,
        sampler="{replicas: 1, max_replicas: 2, target_sequences: 4}",
        model_extra="  heartbeat_timeout_seconds: 300\n",  # the first one isn't lost, however long it is held
    )
    server = running_server.start(config, hub_root, port)
    [first] = processes_of(server, "ray::SamplerProcess")
    try:
        prompt = random_batch(3, (6,))[0].model_input.to_ints()
        with ServiceClient(server.base_url, api_key="ada") as service:
            client = service.create_lora_training_client(MODEL, rank=4, seed=1)
            client.forward_backward(random_batch(1, (9, 7))).result()
            client.optim_step(learning_rate=1e-2).result()
            sampler = client.save_weights_and_get_sampling_client()
            expected = sampler.sample(prompt, 1, GREEDY).sequences[0].tokens
            os.kill(first, signal.SIGSTOP)
            samples = [sampler.sample(prompt, 1, GREEDY) for _ in range(12)]
            # Half of them, which were waiting for the first one, are drawn by the second.
            wait_for("the second", lambda: sum(sample.done() for sample in samples) == 6)
            assert len(processes_of(server, "ray::SamplerProcess") - {first}) == 1
            os.kill(first, signal.SIGCONT)
            for sample in samples:
                assert sample.result().sequences[0].tokens == expected
    finally:
        os.kill(first, signal.SIGCONT)
        server.stop()


def test_a_server_without_samplers_trains_saves_and_says_what_it_does_not_do(
    hub_root: Path, tmp_path: Path
) -> None:
    port = running_server.free_port()
    config = running_server.write_config(tmp_path, port, sampler="{engine: none}")
    server = running_server.start(config, hub_root, port)
    try:
        assert "This server only trains: sampler.engine is none." in "".join(server.lines)
        service = tinker.ServiceClient(base_url=server.base_url, api_key="tml-ada")
        with ServiceClient(server.base_url, api_key="ada") as native:
            [model] = native.get_server_capabilities().supported_models
            assert (model.trainable, model.sampleable) == (True, False)
            client = native.create_lora_training_client(MODEL, rank=4)
            client.forward_backward(random_batch(1, (9, 7))).result()
            client.optim_step(learning_rate=1e-2).result()
            saved = client.save_weights_for_sampler("for-elsewhere").path
            for refused in (
                lambda: native.create_sampling_client(base_model=MODEL),
                lambda: native.create_sampling_client(model_path=saved),
                client.save_weights_and_get_sampling_client,
            ):
                with pytest.raises(InvalidRequest, match="no samplers"):
                    refused()
            client.forward_backward(random_batch(1, (9, 7))).result()
            client.optim_step(learning_rate=1e-2).result()
        prompt = tinker.ModelInput.from_ints([1, 2, 3])
        with pytest.raises(tinker.BadRequestError, match="no samplers"):
            sampler = service.create_sampling_client(base_model=MODEL)
            sampler.result().sample(prompt, 1, tinker.SamplingParams(max_tokens=1)).result()
    finally:
        server.stop()
