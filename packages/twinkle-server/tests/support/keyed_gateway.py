"""A gateway that checks keys, in front of a whole service with the fake backend, and a tenant with something of
everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fake_service import MODEL, make_config

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.app import build_service
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import LimitsSection
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.gateway.app import create_app
from twinkle.server.keys import KeyRing, Role, create_key
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.tokens import Signer

SECRET = "a secret that is long enough for its hash"


class KeyedGateway:
    """`service` behind `app`, whose keys are in `database`."""

    def __init__(self, directory: Path) -> None:
        self.signer = Signer(SECRET)
        worker = LocalWorker(FakeBackend(ModelConfig(directory)), FakeEngine())
        self.service = build_service(make_config(directory), worker, signer=self.signer)
        self.database = self.service.parts.database
        self.app = create_app(
            self.service, LimitsSection(max_request_bytes=2**20), self.signer, keys=KeyRing(self.database)
        )

    def new_key(self, tenant: str | None = None, role: Role = "user") -> str:
        return create_key(self.database, tenant, role)[1]

    def client(self, key: str | None, **more: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://test",
            headers={} if key is None else {"X-API-Key": key},
            **more,
        )


@dataclass
class Belongings:
    """What a tenant has, by the names of the fields of requests that may name it."""

    names: dict[str, Any]
    a_pass: bytes
    download: str


async def make_belongings(http: httpx.AsyncClient) -> Belongings:
    """A session, a run, a checkpoint, a sampler, a result and an address for a download."""

    async def post(path: str, /, **body: Any) -> Any:
        response = await http.post(PREFIX + path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def do(path: str, /, **body: Any) -> Any:
        return await post("/retrieve_future", request_id=(await post(path, **body))["request_id"])

    session = (await post("/create_session"))["session_id"]
    lora = {"rank": 2}
    request = await post(
        "/create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config=lora
    )
    run = (await post("/retrieve_future", request_id=request["request_id"]))["model_id"]
    path = (await do("/save_weights", model_id=run, seq_id=1, path="private"))["path"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
    sampler = (await post("/create_sampling_session", **sampling))["sampling_session_id"]
    urls = await http.get(f"{PREFIX}/training_runs/{run}/checkpoints/weights/private/external_weights_urls")
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    return Belongings(
        {
            "session_id": session,
            "model_id": run,
            "run_id": run,
            "request_id": request["request_id"],
            "sampling_session_id": sampler,
            "sampler_id": sampler,
            "path": path,
            "tinker_path": path,
            "source_path": path,
            "target": {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 1},
            "kind": "weights",
            "name": "private",
        },
        codec.encode_forward_backward(m.ForwardBackwardRequest(run, 2, [datum], "cross_entropy")),
        next(iter(urls.json()["urls"].values())),
    )
