"""Tenants train through the real SDK while an adversary does what it can; then each adapter is what it was to be.

A short form by default; `scripts/hatch run chaos` is the long one, and prints what was done and what was lost.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running_server
from chaos_faults import Adversary, OneMachine, Site, own_disk
from chaos_machines import SeveralMachines
from chaos_network import Network
from peft_reference import MODEL, random_batch
from running_postgresql import RunningPostgresql
from running_s3 import RunningS3
from safetensors import safe_open
from safetensors.numpy import load_file

from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve

FAULTS = int(os.environ.get("TWINKLE_CHAOS_FAULTS", "30"))
SEED = int(os.environ.get("TWINKLE_CHAOS_SEED", "0"))
# "one machine", or "several machines": with two ranks, two samplers, PostgreSQL and S3.
ON = os.environ.get("TWINKLE_CHAOS_ON", "one machine").split(",")
TENANTS = 3
# So that training is no chaos of its own: at a hundred times this rate a difference in the last bit is tenfold after
# seven steps. A pass too many or too few makes a hundredth.
RATE = 1e-4
# Between two steps: what company changes in the last bit adds up with steps, to 1e-5 in a thousand.
THINKING_SECONDS = 0.15


class Training(threading.Thread):
    """One tenant's loop, which goes on until it is told to stop; every answer is counted.

    Attributes:
        tenant: its API key.
        steps: optimizer steps that were answered.
        answered: all operations that were.
    """

    def __init__(self, tinker: Any, base_url: str, number: int) -> None:
        super().__init__(daemon=True)
        self._tinker = tinker
        self._base_url = base_url
        self._number = number
        self.tenant = f"tml-tenant-{number}"
        self.enough = threading.Event()
        self.steps = self.answered = 0
        self.path = ""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # told by whoever waits
            self.error = error

    def _run(self) -> None:
        client = self.begin(self._base_url)
        while not self.enough.is_set() or self.steps == 0:
            self.step(client, self.steps)
            self.steps += 1
            self.answered += 3
            time.sleep(THINKING_SECONDS)
            if self.steps % 7 == 0:
                client.save_state(f"at-{self.steps}").result()
                sampler = client.save_weights_and_get_sampling_client()
                params = self._tinker.types.SamplingParams(max_tokens=3, temperature=0.0)
                prompt = self._tinker.types.ModelInput.from_ints([1, 2, 3])
                sampler.sample(prompt, 1, params).result()
                self.answered += 3
        self.path = client.save_state("last").result().path

    def begin(self, base_url: str) -> Any:
        service = self._tinker.ServiceClient(base_url=base_url, api_key=self.tenant)
        return service.create_lora_training_client(MODEL, rank=2 + self._number, seed=1 + self._number)

    def step(self, client: Any, number: int) -> None:
        """Two passes and an optimizer step, sent without waiting, on one of eight batches."""
        pending = [
            client.forward_backward(self._data(2 * number + half), "cross_entropy") for half in range(2)
        ]
        pending.append(client.optim_step(self._tinker.types.AdamParams(learning_rate=RATE)))
        for future in pending:
            future.result()

    def _data(self, number: int) -> list[Any]:
        types = self._tinker.types
        return [
            types.Datum(
                model_input=types.ModelInput.from_ints(datum.model_input.tokens.tolist()),
                loss_fn_inputs={
                    name: types.TensorData.from_numpy(tensor.array)
                    for name, tensor in datum.loss_fn_inputs.items()
                },
            )
            for datum in random_batch(1000 * self._number + number % 8, (9, 5))
        ]


def state(base_url: str, tenant: str, path: str, directory: Path) -> tuple[dict[str, np.ndarray], int]:
    """All tensors of a checkpoint, and how many steps its optimizer has taken."""
    with ServiceClient(base_url, api_key=tenant) as service:
        folder = service.create_rest_client().download_checkpoint(path, directory)
    with safe_open(folder / "optimizer.safetensors", framework="numpy") as file:
        steps = int(file.metadata()["step"])
    return load_file(folder / "adapter_model.safetensors") | load_file(
        folder / "optimizer.safetensors"
    ), steps


def deviation(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference of any two matrices, relative to the largest number in them."""
    assert mine.keys() == theirs.keys()
    return max(
        float(np.abs(mine[name] - theirs[name]).max() / max(np.abs(theirs[name]).max(), 1e-30))
        for name in theirs
    )


@pytest.fixture(params=ON)
def site(request: pytest.FixtureRequest, qwen3_hub_root: Path, tmp_path: Path) -> Iterator[Site]:
    if request.param == "several machines":
        postgresql: RunningPostgresql = request.getfixturevalue("postgresql")
        s3: RunningS3 = request.getfixturevalue("s3")
        several = SeveralMachines(tmp_path, qwen3_hub_root, postgresql, s3)
        yield several
        several.close()
        return
    storage = tmp_path / "storage"
    storage.mkdir()
    with own_disk(storage, megabytes=256) as has_own_disk:
        port = running_server.free_port()
        config = running_server.write_config(tmp_path, port, replicas=2, extra="  snapshot_seconds: 1\n")
        one = OneMachine(config, qwen3_hub_root, port, storage, has_own_disk)
        yield one
        one.close()


@pytest.mark.timeout(120 + 30 * FAULTS)
def test_whatever_happens_each_adapter_is_what_it_was_to_be(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tinker = pytest.importorskip("tinker")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    url = f"http://127.0.0.1:{site.port}"
    network = Network(url)
    try:
        trainings = [Training(tinker, network.url, number) for number in range(TENANTS)]
        adversary = Adversary(site, network, SEED, FAULTS)
        for thread in (*trainings, adversary):
            thread.start()
        adversary.join()
        for training in trainings:
            training.enough.set()
        for training in trainings:
            training.join()
        assert adversary.error is None, adversary.error
        assert [training.error for training in trainings] == [None] * TENANTS, "".join(site.lines)

        lost = 0
        deviations: list[float] = []
        for training in trainings:
            folder = tmp_path / training.tenant
            found, steps = state(url, training.tenant, training.path, folder / "found")
            lost += training.steps - steps
            undisturbed = training.begin(url)
            for number in range(training.steps):
                training.step(undisturbed, number)
            path = undisturbed.save_state("undisturbed").result().path
            expected, _ = state(url, training.tenant, path, folder / "expected")
            deviations.append(deviation(found, expected))
        with capsys.disabled():
            print()
            for kind, count in sorted(adversary.injected.items()):
                print(f"{count:5d}  {kind}")
            print(
                f"{adversary.injected.total()} faults of {len(adversary.injected)} kinds; "
                f"{sum(training.answered for training in trainings)} operations acknowledged; {lost} lost or "
                f"applied twice; largest deviation of an adapter {max(deviations):.1e}"
            )
        assert lost == 0
        assert max(deviations) <= 1e-5
    finally:
        network.close()
