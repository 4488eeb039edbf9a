"""Two servers on one PostgreSQL and one S3 root: each goes on with its own runs, and has all checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from fake_service import MODEL, Tenant
from random_client import a_pass, a_step, bits
from running_postgresql import RunningPostgresql
from running_s3 import RunningS3

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import NotFound, Unavailable
from twinkle.server.app import build_service, build_signer, live_directory
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import ModelSection, ServerConfig, StorageSection
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.tokens import ARCHIVE, Download


class Machine:
    """A server on a shared storage, with a disk of its own; all have the same port and model."""

    def __init__(self, url: str, root: str, disk: Path) -> None:
        storage = StorageSection(root=root, local_root=disk, database_url=url, snapshot_seconds=0)
        self.config = ServerConfig(model=ModelSection(model_id=MODEL), storage=storage)
        self.backend = FakeBackend(ModelConfig(Path("fake")))
        self.signer = build_signer(self.config)
        self._alice: Tenant | None = None

    @property
    def alice(self) -> Tenant:
        assert self._alice is not None
        return self._alice

    async def start(self) -> Tenant:
        self.backend = FakeBackend(ModelConfig(Path("fake")))
        worker = LocalWorker(self.backend, FakeEngine())
        service = build_service(self.config, worker, signer=self.signer, live=live_directory(self.config))
        await service.start()
        self._alice = Tenant(service, "alice")
        return self._alice

    async def close(self) -> None:
        if self._alice is not None:
            await self._alice.service.close()
            self._alice = None

    async def start_again(self) -> Tenant:
        await self.close()
        return await self.start()

    def state(self, run: str) -> dict[str, bytes]:
        return bits(self.backend.export_adapter(run, with_optimizer=True, with_gradients=True))


@pytest.fixture
async def machines(
    postgresql: RunningPostgresql, s3: RunningS3, tmp_path: Path
) -> AsyncIterator[tuple[Machine, Machine]]:
    url, root = postgresql.new_database(), s3.new_root()
    one, other = Machine(url, root, tmp_path / "one"), Machine(url, root, tmp_path / "other")
    await one.start()
    await other.start()
    yield one, other
    for server in (postgresql, s3):
        server.start_if_stopped()
    await one.close()
    await other.close()


async def train(alice: Tenant, run: str, first_seq_id: int) -> None:
    await alice.do(a_pass(run, first_seq_id))
    await alice.do(a_step(run, first_seq_id + 1))
    await alice.do(a_pass(run, first_seq_id + 2, forward_only=True))


async def test_each_server_goes_on_with_its_own_runs(machines: tuple[Machine, Machine]):
    one, other = machines
    runs = {machine: await machine.alice.run(seed=seed) for seed, machine in enumerate(machines)}
    for machine, run in runs.items():
        await train(machine.alice, run, 1)
    before = {machine: machine.state(run) for machine, run in runs.items()}
    for machine in (one, other, one):
        await machine.start_again()
    for machine, run in runs.items():
        await machine.alice.do(a_pass(run, 4, forward_only=True))
        assert machine.state(run) == before[machine]
        await train(machine.alice, run, 5)
        assert machine.state(run) != before[machine]
    with pytest.raises(NotFound):
        await one.alice.do(a_pass(runs[other], 8))


async def test_a_checkpoint_is_on_all_of_them(machines: tuple[Machine, Machine]):
    one, other = machines
    run = await one.alice.run()
    await train(one.alice, run, 1)
    uri = uris.parse((await one.alice.do(m.SaveWeightsRequest(model_id=run, seq_id=4, path="name"))).path)
    theirs = await other.alice.run(seed=5)
    await other.alice.do(m.LoadWeightsRequest(model_id=theirs, seq_id=1, path=str(uri)))
    mine, loaded = one.backend.export_adapter(run, False), other.backend.export_adapter(theirs, False)
    for name, matrix in mine.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], matrix)

    urls = await one.alice.ask(
        m.GetCheckpointArchive.model_validate({"run_id": run, "kind": uri.kind, "name": uri.name})
    )
    [url] = urls.urls.values()
    wanted = other.signer.read_download(url.split("/download/")[1].split("/")[0])
    sizes = await other.alice.service.download_sizes(wanted)
    assert wanted.file == ARCHIVE and "adapter_model.safetensors" in sizes
    part = await other.alice.service.download_part(wanted, "adapter_model.safetensors", 8, 16)
    assert len(part) == 16

    await other.alice.service.parts.checkpoints.delete(
        await other.alice.service.parts.checkpoints.find("alice", str(uri))
    )
    with pytest.raises(NotFound):
        await one.alice.service.download_part(wanted, "adapter_model.safetensors", 8, 16)
    outcome = await one.alice.do(m.LoadWeightsRequest(model_id=run, seq_id=5, path=str(uri)))
    assert isinstance(outcome, m.Failure) and "there is no checkpoint" in outcome.error


async def test_saves_wait_for_a_store_that_is_away_and_reads_are_refused(
    machines: tuple[Machine, Machine], s3: RunningS3
):
    alice = machines[0].alice
    run = await alice.run()
    await train(alice, run, 1)
    uri = (await alice.do(m.SaveWeightsRequest(model_id=run, seq_id=4, path="first"))).path
    s3.stop()
    save = asyncio.create_task(alice.do(m.SaveWeightsRequest(model_id=run, seq_id=5, path="second")))
    load = asyncio.create_task(alice.do(m.LoadWeightsRequest(model_id=run, seq_id=6, path=uri)))
    with pytest.raises(Unavailable, match="can't be reached just now"):
        await alice.service.download_sizes(Download("alice", uri, ARCHIVE, "stamp"))
    place = uris.parse(uri)
    delete = m.DeleteCheckpoint.model_validate({"run_id": run, "kind": place.kind, "name": place.name})
    with pytest.raises(Unavailable, match="can't be reached just now"):
        await alice.ask(delete)
    assert not save.done() and not load.done()
    s3.start()
    assert (await save).path.endswith("/weights/second")
    assert not isinstance(await load, m.Failure), "it is still there"
    await alice.ask(delete)
    with pytest.raises(NotFound):
        await alice.ask(delete)
