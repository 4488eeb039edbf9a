"""Whether the server is ready, and what it tells of itself where it is not, or where one asks for what isn't there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import MODEL, Tenant
from mortal_worker import MortalWorker, make_mortal_service
from restarted_service import HARDLY_EVER

from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.errors import ServerFault, TwinkleError, words_of
from twinkle.server.config import LimitsSection
from twinkle.server.gateway.app import create_app
from twinkle.server.service.service import Service
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.files import LocalFiles
from twinkle.server.tokens import ARCHIVE, Download, Signer


def client(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(
        create_app(service, LimitsSection(), Signer("secret")), raise_app_exceptions=False
    )
    return httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}")


async def test_ready_is_a_server_that_has_trained_and_sampled_and_has_its_process(tmp_path: Path):
    worker = MortalWorker()
    service = make_mortal_service(tmp_path, worker, HARDLY_EVER)
    async with client(service) as http:

        async def status() -> tuple[int, str]:
            assert (await http.get("/healthz")).status_code == 200
            reply = await http.get("/readyz")
            assert ("retry-after" in reply.headers) == (reply.status_code == 503)
            return reply.status_code, reply.json().get("error", "")

        code, why = await status()
        assert code == 503 and "a training step and a sample come first" in why
        await service.start()
        assert {"forward_backward", "generate"} <= {name for name, _ in worker.calls}
        assert await status() == (200, "")
        worker.may_restart.clear()
        worker.die()
        code, why = await status()
        assert code == 503 and "is being restarted" in why
        worker.may_restart.set()
        await worker.available()
        assert await status() == (200, "")
        worker.restart_fails = ServerFault("no")
        worker._back.clear()
        worker.die()
        tenant = Tenant(service, "a")
        outcome = await tenant.do(
            m.CreateModelRequest(session_id=await tenant.session(), model_seq_id=0, base_model=MODEL)
        )
        assert isinstance(outcome, m.Failure)
        code, why = await status()
        assert code == 503 and "could not be restarted" in why
    await service.close()


@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("DELETE", ""),
        ("POST", "/publish"),
        ("DELETE", "/publish"),
        ("PUT", "/ttl"),
        ("GET", "/archive"),
        ("GET", "/external_weights_urls"),
    ],
)
async def test_a_checkpoint_by_its_name_alone_is_told_what_a_name_looks_like(
    tmp_path: Path, method: str, end: str
):
    service = make_mortal_service(tmp_path, MortalWorker(), HARDLY_EVER)
    async with client(service) as http:
        reply = await http.request(
            method, f"/training_runs/s:train:0/checkpoints/step-100{end}", json={"ttl_seconds": 60}
        )
        assert reply.status_code == 400, reply.text
        assert "sampler_weights" in reply.json()["error"] and reply.json()["category"] == "user"
    await service.close()


# ---------------------------------------------------------------- what belongs to this machine


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    write(path, json.dumps(values))


def into_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def list_another(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        other = {"sha256": "0" * 64, "size_bytes": 1}
        rewrite(directory / "manifest.json", lambda manifest: manifest["files"].update({name: other}))

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no manifest": lambda directory: (directory / "manifest.json").unlink(),
    "a manifest that is no file": lambda directory: into_a_directory(directory / "manifest.json"),
    "no JSON": lambda directory: write(directory / "manifest.json", "{"),
    "another JSON": lambda directory: write(directory / "manifest.json", "[]"),
    "no adapter": lambda directory: (directory / "adapter_model.safetensors").unlink(),
    "an adapter that is no file": lambda directory: into_a_directory(directory / "adapter_model.safetensors"),
    "nothing": lambda directory: shutil.rmtree(directory),
    "a path": list_another("../../../../etc/passwd"),
    "an absolute path": list_another("/etc/passwd"),
    "the directory": list_another(".."),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_checkpoint_says_nothing_of_this_machine_and_offers_only_its_files(
    tmp_path: Path, damage: str
):
    service = make_mortal_service(tmp_path, MortalWorker(), HARDLY_EVER)
    await service.start()
    tenant = Tenant(service, "a")
    run = await tenant.run()
    uri = (await tenant.do(m.SaveWeightsRequest(model_id=run, seq_id=1, path="one"))).path
    directory = tmp_path / "checkpoints" / run / "weights" / "one"
    DAMAGES[damage](directory)
    said: list[str] = []

    async def ask(work: Any) -> None:
        try:
            outcome = await work
        except TwinkleError as error:
            said.append(error.message)
        else:
            said.append(outcome.error if isinstance(outcome, m.Failure) else str(outcome))

    await ask(tenant.do(m.LoadWeightsRequest(model_id=run, seq_id=2, path=uri)))
    await ask(tenant.do(m.LoadWeightsRequest(session_id=await tenant.session(), model_seq_id=0, path=uri)))
    await ask(tenant.ask(m.CopyWeightsRequest(source_path=uri)))
    await ask(service.download_sizes(Download("a", uri, ARCHIVE)))
    for text in said:
        assert str(tmp_path) not in text and "etc/passwd" not in text.replace("'../../../../etc/passwd'", "")
    assert len(said) == 4 and "one" in said[0]
    await service.close()


def test_names_in_a_manifest_are_names(tmp_path: Path):
    from twinkle.protocol.uris import parse

    files, uri = CheckpointFiles(LocalFiles(tmp_path)), parse("tinker://run/weights/one")
    directory = tmp_path / "run" / "weights" / "one"
    directory.mkdir(parents=True)
    write(directory / "a.safetensors", "a")
    for name, is_name in (
        ("a.safetensors", True),
        ("../a", False),
        ("/a", False),
        ("a/b", False),
        ("..", False),
        ("", False),
    ):
        manifest = {"format": 1, "files": {name: {"sha256": "", "size_bytes": 1}}}
        write(directory / "manifest.json", json.dumps(manifest))
        if is_name:
            assert files.sizes(uri) == {name: 1}
        else:
            with pytest.raises(ServerFault, match="its files are incomplete .*name"):
                files.sizes(uri)


def test_the_words_of_an_error_have_no_paths():
    for error, words in (
        (FileNotFoundError(2, "No such file or directory", "/srv/a/b"), "No such file or directory"),
        (OSError("No such file or directory: /srv/a/b.json"), "No such file or directory: ..."),
        (ValueError("'/x/y': bad, file:///z/w too"), "'...': bad, ... too"),
        (ValueError("tinker://run/weights/a and/or 1/2 of it"), "tinker://run/weights/a and/or 1/2 of it"),
    ):
        assert words_of(error) == words
