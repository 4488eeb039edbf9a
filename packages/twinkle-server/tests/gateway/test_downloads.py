"""An address gives the files of the checkpoint that it was made for, to those who may read it, and no others."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import MODEL
from keyed_gateway import KeyedGateway

from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.files import LocalFiles
from twinkle.server.tokens import DOWNLOAD_SECONDS

KINDS = ["/external_weights_urls", "/archive"]


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[KeyedGateway]:
    gateway = KeyedGateway(tmp_path)
    await gateway.service.start()
    yield gateway
    await gateway.service.close()


class Owner:
    """A tenant with one run, whose checkpoints are all called `name`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.run = ""
        self.seq_id = 0

    async def post(self, path: str, /, **body: Any) -> Any:
        response = await self.http.post(PREFIX + path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def do(self, path: str, /, **body: Any) -> Any:
        return await self.post("/retrieve_future", request_id=(await self.post(path, **body))["request_id"])

    async def begin(self) -> None:
        session = (await self.post("/create_session"))["session_id"]
        lora = {"rank": 2}
        created = await self.do(
            "/create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config=lora
        )
        self.run = created["model_id"]

    async def save(self) -> None:
        self.seq_id += 1
        saved = await self.do(
            "/save_weights", model_id=self.run, seq_id=self.seq_id, path="name", overwrite=True
        )
        assert "path" in saved, saved

    @property
    def place(self) -> str:
        return f"{PREFIX}/training_runs/{self.run}/checkpoints/weights/name"

    async def publish(self, how: str = "POST") -> None:
        assert (await self.http.request(how, f"{self.place}/publish")).status_code == 200


@pytest.fixture
async def owner(gateway: KeyedGateway) -> AsyncIterator[Owner]:
    async with gateway.client(gateway.new_key("owner")) as http:
        owner = Owner(http)
        await owner.begin()
        await owner.save()
        await owner.publish()
        yield owner


@pytest.fixture
async def reader(gateway: KeyedGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.client(gateway.new_key("reader")) as http:
        yield http


async def address(http: httpx.AsyncClient, owner: Owner, kind: str) -> str:
    """Of the weights, or of all files in one."""
    response = await http.get(owner.place + kind)
    if kind == "/archive":
        assert response.status_code == 302, response.text
        return response.headers["location"]
    return response.json()["urls"]["adapter_model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_address_ends_with_what_was_published(owner: Owner, reader: httpx.AsyncClient, kind: str):
    theirs, own = await address(reader, owner, kind), await address(owner.http, owner, kind)
    assert (await reader.get(theirs)).content == (await reader.get(own)).content
    await owner.publish("DELETE")
    refused = await reader.get(theirs)
    assert refused.status_code == 404 and "no longer published" in refused.text
    assert (await reader.get(own)).status_code == 200
    await owner.publish()
    assert (await reader.get(theirs)).status_code == 200


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["overwritten", "deleted and made again", "published again"])
async def test_an_address_never_gives_another_checkpoint_of_the_same_name(
    owner: Owner, reader: httpx.AsyncClient, kind: str, how: str
):
    addresses = [await address(http, owner, kind) for http in (reader, owner.http)]
    if how == "deleted and made again":
        assert (await owner.http.delete(owner.place)).status_code == 200
        assert [(await reader.get(old)).status_code for old in addresses] == [404, 404]
    await owner.save()
    if how == "published again":
        await owner.publish()
    assert [(await reader.get(old)).status_code for old in addresses] == [404, 404]
    assert (await reader.get(await address(owner.http, owner, kind))).status_code == 200


async def test_while_a_checkpoint_is_overwritten_its_old_address_gives_nothing(
    gateway: KeyedGateway,
    owner: Owner,
    reader: httpx.AsyncClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The files are there before their row: for as long as the database can't be written to."""
    old = await address(reader, owner, "/external_weights_urls")
    assert (await reader.get(old)).status_code == 200
    held, put = asyncio.Event(), gateway.service.parts.database.put_checkpoint
    loop = asyncio.get_running_loop()

    def late(row: Any) -> None:
        asyncio.run_coroutine_threadsafe(held.wait(), loop).result()
        put(row)

    monkeypatch.setattr(gateway.service.parts.database, "put_checkpoint", late)
    files, uri = (
        CheckpointFiles(LocalFiles(tmp_path / "checkpoints")),
        CheckpointUri("name", owner.run, "weights"),
    )
    first = files.digest(uri)
    datum = {"model_id": owner.run, "seq_id": 2, "path": "name", "overwrite": True}
    step = await owner.do("/optim_step", model_id=owner.run, seq_id=1 + owner.seq_id, adam_params={})
    assert "error" not in step
    promise = await owner.post("/save_weights", **{**datum, "seq_id": 2 + owner.seq_id})
    while files.digest(uri) == first:
        await asyncio.sleep(0.005)
    response = await reader.get(old)
    assert response.status_code == 404
    held.set()
    await owner.post("/retrieve_future", request_id=promise["request_id"])


async def test_a_part_that_is_read_after_an_overwriting_is_of_no_use(gateway: KeyedGateway, owner: Owner):
    url = await address(owner.http, owner, "/external_weights_urls")
    download = gateway.signer.read_download(url.split("/download/")[1].split("/")[0])
    first = await gateway.service.download_part(download, download.file, 0, 10)
    assert len(first) == 10
    await owner.do("/optim_step", model_id=owner.run, seq_id=1 + owner.seq_id, adam_params={})
    owner.seq_id += 1
    await owner.save()
    with pytest.raises(Exception, match="overwritten"):
        await gateway.service.download_part(download, download.file, 10, 10)


async def test_an_archive_has_the_files_that_the_addresses_give(owner: Owner, reader: httpx.AsyncClient):
    urls = (await reader.get(owner.place + "/external_weights_urls")).json()["urls"]
    archive = (await reader.get(await address(reader, owner, "/archive"))).content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        inside = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # pyright: ignore[reportOptionalMemberAccess]
    assert inside == {name: (await reader.get(url)).content for name, url in urls.items()}


async def test_an_address_of_an_earlier_version_is_asked_for_anew(gateway: KeyedGateway, owner: Owner):
    place = str(CheckpointUri("name", owner.run, "weights"))
    claims = {"sub": "owner", "place": place, "file": "adapter_model.safetensors"}
    token = gateway.signer._sign("download", DOWNLOAD_SECONDS, claims)
    refused = await owner.http.get(f"{PREFIX}/download/{token}/adapter_model.safetensors")
    assert refused.status_code == 404 and "ask for a new address" in refused.text
