"""A server with several engines behind one door: two with the mission's model, and one with another model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import running_server
import sdk_suite
import tinker
import torch
from peft_reference import MODEL, random_batch
from server_processes import CLUSTER, processes_with, times_ready, wait_for
from transformers import AutoConfig, AutoModelForCausalLM

from twinkle.protocol.errors import InvalidRequest, QuotaReached, TwinkleError
from twinkle.protocol.types import ForwardBackwardOutput, SamplingParams
from twinkle_client import ServiceClient, TrainingClient

pytestmark = pytest.mark.serve

OTHER = "tests/other"
GREEDY = SamplingParams(max_tokens=16, temperature=0)
BATCH = random_batch(1, (9, 7))


@pytest.fixture(scope="module")
def models(qwen3_hub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub root with a second model: as large, with other weights and another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(qwen3_hub_root / MODEL, root / MODEL)
    shutil.copytree(qwen3_hub_root / MODEL, root / OTHER)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = AutoConfig.from_pretrained(root / MODEL)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / OTHER)
    (root / OTHER / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return root


class Door:
    """The server, and `twinkle-server models` for it."""

    def __init__(self, directory: Path, models: Path) -> None:
        self.config, self.models = directory / "server_config.yaml", models
        self.port = running_server.free_port()
        self.config.write_text(
            f"models:\n  - {{model_id: ms://{MODEL}, replicas: 2, torch_dtype: float32}}\n"
            f"  - {{model_id: {OTHER}, max_lora_rank: 16, torch_dtype: float32, limits: {{max_runs: 2}}}}\n"
            f"server: {{host: 127.0.0.1, port: {self.port}}}\nray: {{num_gpus: 0}}\n"
            f"storage: {{root: {directory / 'storage'}}}\n",
            encoding="utf-8",
        )
        self.server = running_server.start(self.config, models, self.port)
        self.url = self.server.base_url

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "twinkle.server", "models", *command, "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def engines(self) -> dict[str, dict[str, str]]:
        """What `models list` shows, by engine."""
        heading, *lines = self.run("list").splitlines()
        columns = ("MODEL", "STATE", "RUNS", "IN FILE", "MESSAGE")
        starts = [heading.index(column) for column in columns]
        ends = [*starts[1:], None]
        cut = list(zip(columns, starts, ends, strict=True))
        return {
            line.split()[0]: {column: line[start:end].strip() for column, start, end in cut} for line in lines
        }

    def runs(self, model: str) -> list[int]:
        """Of each engine with it that works."""
        rows = self.engines().values()
        return sorted(int(row["RUNS"]) for row in rows if (row["MODEL"], row["STATE"]) == (model, "running"))

    def process_of(self, engine: str) -> int:
        [process] = processes_with(self.server, f"ServeReplica:twinkle-{engine}:engine")
        return process


@pytest.fixture(scope="module")
def door(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    door = Door(tmp_path_factory.mktemp("door"), models)
    yield door
    door.server.stop()


def train(client: TrainingClient, steps: int) -> list[list[list[float]]]:
    """The log-probabilities of each step's sequences."""
    return [_logprobs(_step(client)) for _ in range(steps)]


def _step(client: TrainingClient) -> ForwardBackwardOutput:
    passed, stepped = client.forward_backward(BATCH), client.optim_step(learning_rate=1e-2)
    stepped.result()
    return passed.result()


def _logprobs(output: ForwardBackwardOutput) -> list[list[float]]:
    return [each["logprobs"].array.tolist() for each in output.loss_fn_outputs]


def while_training(
    client: TrainingClient, steps: int, disturb: Callable[[], object]
) -> list[list[list[float]]]:
    """What `train` returns, with something done meanwhile."""
    outputs: list[list[list[float]]] = []
    begun = threading.Event()

    def loop() -> None:
        for _ in range(steps):
            outputs.extend(train(client, 1))
            begun.set()

    training = threading.Thread(target=loop)
    training.start()
    assert begun.wait(60)
    disturb()
    training.join(300)
    assert len(outputs) == steps
    return outputs


# ---------------------------------------------------------------- what clients see


def test_capabilities_limits_and_tokenizers_are_each_models_own(door: Door) -> None:
    with ServiceClient(door.url, api_key="ada") as service:
        found = {model.model_name: model for model in service.get_server_capabilities().supported_models}
        assert {name: model.max_lora_rank for name, model in found.items()} == {MODEL: 128, OTHER: 16}
        with pytest.raises(InvalidRequest, match=r"lora_config\.rank: 17"):
            service.create_lora_training_client(OTHER, rank=17)
        with pytest.raises(InvalidRequest, match=f"'a/b' is not served here.*'{MODEL}', '{OTHER}'"):
            service.create_lora_training_client("a/b")
        for _ in range(2):
            service.create_lora_training_client(OTHER, rank=2)
        with pytest.raises(QuotaReached, match=r"limits\.max_runs"):
            service.create_lora_training_client(OTHER, rank=2)
        service.create_lora_training_client(MODEL, rank=2)
    headers = {"X-API-Key": "ada"}
    for model in (MODEL, OTHER):
        path = "/api/v1/tokenizer_urls"
        urls = httpx.get(door.url + path, params={"base_model": model}, headers=headers).json()["urls"]
        for name in ("tokenizer_config.json", "tokenizer.json"):
            assert httpx.get(urls[name]).content == (door.models / model / name).read_bytes()


@pytest.mark.timeout(1200)
def test_the_sdks_suite_passes_through_the_door(door: Door) -> None:
    files = ("test_loop.py", "test_sampling.py", "test_rest.py")
    tests = f"({sdk_suite.UNPATCHED}) and not test_capabilities"  # it expects one model
    sdk_suite.run(door.url, door.models / MODEL, tests, files)


def test_checkpoints_of_a_model_are_used_on_all_its_engines(door: Door) -> None:
    with ServiceClient(door.url, api_key="ada") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        before = train(client, 2)
        path = client.save_state("half").result().path
        resumed = [service.create_training_client_from_state_with_optimizer(path) for _ in range(3)]
        after = train(client, 2)
        assert before != after
        assert [train(each, 2) for each in resumed] == [after] * 3  # on both engines
        sampler = service.create_sampling_client(
            model_path=client.save_weights_for_sampler("s").result().path
        )
        base = service.create_sampling_client(base_model=OTHER)
        prompt = BATCH[0].model_input.to_ints()
        drawn = [one.sample(prompt, 1, GREEDY).sequences[0].tokens for one in (sampler, base)]
        plain = cast(Any, AutoModelForCausalLM.from_pretrained(door.models / OTHER, dtype=torch.float32))
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ]
        assert drawn[1] == expected.tolist()[: len(drawn[1])]
        assert drawn[0] != drawn[1]


# ---------------------------------------------------------------- engines that come and go


@pytest.mark.timeout(600)
def test_runs_are_spread_and_go_on_when_their_engine_is_drained(door: Door) -> None:
    with ServiceClient(door.url, api_key="ada") as service:
        one, two = (service.create_lora_training_client(MODEL, rank=4, seed=1) for _ in range(2))
        assert train(one, 3) == train(two, 3)
        sdk = tinker.ServiceClient(base_url=door.url, api_key="tml-ada")
        third = sdk.create_lora_training_client(MODEL, rank=4, seed=1).result()
        wait_for("an engine's runs", lambda: len(door.runs(MODEL)) == 2 and min(door.runs(MODEL)) > 0)
        sampler = one.save_weights_and_get_sampling_client()
        prompt = BATCH[0].model_input.to_ints()
        drawn = sampler.sample(prompt, 2, GREEDY).sequences
        queued = [two.forward_backward(BATCH) for _ in range(20)]
        disturbed = while_training(one, 40, lambda: door.run("drain", "e1"))
        assert [future.result().metrics for future in queued] == [queued[0].result().metrics] * 20
        engines = door.engines()
        assert (engines["e1"]["STATE"], engines["e1"]["MESSAGE"]) == ("stopped", "its runs are in e2")
        fresh = service.create_lora_training_client(MODEL, rank=4, seed=1)
        train(fresh, 3)
        assert disturbed == train(fresh, 40)
        assert [each.tokens for each in sampler.sample(prompt, 2, GREEDY).sequences] == [
            each.tokens for each in drawn
        ]
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(prompt),
            loss_fn_inputs={
                name: tinker.TensorData.from_numpy(tensor.array)
                for name, tensor in BATCH[0].loss_fn_inputs.items()
            },
        )
        assert third.forward_backward([datum], "cross_entropy").result().loss_fn_outputs
        # Drained, it stays away when the server starts again by itself; all else goes on.
        ready = times_ready(door.server)
        [cluster] = processes_with(door.server, CLUSTER)
        os.kill(cluster, signal.SIGKILL)
        wait_for("the server", lambda: times_ready(door.server) > ready)
        assert train(one, 2) == train(fresh, 2)
        assert door.engines()["e1"]["STATE"] == "stopped"
        assert "e4 (" in door.run("add", MODEL, "--settings", "{torch_dtype: float32}")
        later = service.create_lora_training_client(MODEL, rank=4, seed=1)
        train(later, 45)
        assert train(later, 1) == train(fresh, 1)
        wait_for("its run", lambda: len(door.runs(MODEL)) == 2 and min(door.runs(MODEL)) > 0)


@pytest.mark.timeout(600)
def test_a_killed_engine_goes_on_where_it_was(door: Door) -> None:
    with ServiceClient(door.url, api_key="ada") as service:
        one, two = (service.create_lora_training_client(MODEL, rank=4, seed=2) for _ in range(2))
        victims = [door.process_of(name) for name, row in door.engines().items() if row["STATE"] == "running"]
        disturbed = while_training(one, 20, lambda: [os.kill(each, signal.SIGKILL) for each in victims])
        assert disturbed == train(two, 20)


@pytest.mark.timeout(600)
def test_a_removed_models_runs_wait_until_it_is_added_again(door: Door) -> None:
    with ServiceClient(door.url, api_key="grace") as service:
        one = service.create_lora_training_client(MODEL, rank=4, seed=3)
        wait_for("room", lambda: door.runs(OTHER) != [])
        door.run("remove", OTHER)
        assert [model.model_name for model in service.get_server_capabilities().supported_models] == [MODEL]
        with pytest.raises(TwinkleError, match=f"'{OTHER}' is not served here"):
            service.create_lora_training_client(OTHER)
        train(one, 1)  # the others go on
        assert "running" in door.run("add", OTHER, "--settings", "{torch_dtype: float32, max_lora_rank: 8}")
        found = {model.model_name: model for model in service.get_server_capabilities().supported_models}
        assert found[OTHER].max_lora_rank == 8


@pytest.mark.timeout(600)
def test_an_engine_that_does_not_come_back_gives_its_runs_to_another(door: Door) -> None:
    with ServiceClient(door.url, api_key="grace") as service:
        names = {name for name, row in door.engines().items() if row["MODEL"] == OTHER}
        one = service.create_lora_training_client(OTHER, rank=4, seed=4)
        [lost] = [
            name for name, row in door.engines().items() if (row["MODEL"], row["STATE"]) == (OTHER, "running")
        ]
        assert lost in names
        before = train(one, 3)
        door.run("add", OTHER, "--settings", "{torch_dtype: float32}")
        model = door.models / OTHER

        def lose() -> None:
            model.rename(model.with_name("away"))  # what is loaded goes on; nothing can be started
            os.kill(door.process_of(lost), signal.SIGKILL)

        disturbed = while_training(one, 6, lose)
        model.with_name("away").rename(model)
        assert any(f"runs of engine {lost} go on in engine" in line for line in door.server.lines)
        two = service.create_lora_training_client(OTHER, rank=4, seed=4)
        assert train(two, 9) == [*before, *disturbed]
        wait_for("its successor", lambda: len(door.runs(OTHER)) == 2)
