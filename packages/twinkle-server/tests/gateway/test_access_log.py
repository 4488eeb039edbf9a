"""What the log says of HTTP requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from mortal_worker import MortalWorker, make_mortal_service
from restarted_service import HARDLY_EVER
from starlette.requests import Request

from twinkle.protocol.endpoints import PREFIX
from twinkle.server.config import LimitsSection
from twinkle.server.gateway.access_log import REFUSAL_SECONDS, Refusals
from twinkle.server.gateway.app import create_app
from twinkle.server.logs import fields_of, short_hash
from twinkle.server.tokens import Signer, tenant_of_key


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    own = [record for record in caplog.records if record.name == "twinkle.gateway"]
    return [(record.getMessage(), fields_of(record)) for record in own]


@pytest.mark.parametrize("logs_access", [True, False])
async def test_requests_and_refusals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, logs_access: bool
) -> None:
    service = make_mortal_service(tmp_path, MortalWorker(), HARDLY_EVER)
    app = create_app(service, LimitsSection(), Signer("secret"), logs_access=logs_access)
    caplog.set_level("INFO", "twinkle.gateway")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as http:
        await http.get("/healthz")
        reply = await http.get("/training_runs/none", headers={"X-API-Key": "tml-secret-of-ada"})
    await service.close()
    assert reply.status_code == 404
    refused = [line for line in said(caplog) if line[0].startswith("refused")]
    tenant = short_hash(tenant_of_key("tml-secret-of-ada"))
    path = f"{PREFIX}/training_runs/none"
    assert refused == [
        (f"refused GET {path}: {reply.json()['error']}", {"tenant": tenant, "status": 404}),
    ]
    others = [line for line in said(caplog) if line not in refused]
    for _, fields in others:
        assert 0 <= fields.pop("seconds") < 60
    assert others == (
        [
            (f"GET {PREFIX}/healthz", {"address": "127.0.0.1", "status": 200}),
            (f"GET {path}", {"tenant": tenant, "status": 404}),
        ]
        if logs_access
        else []
    )
    assert "secret-of-ada" not in caplog.text


def request(address: str) -> Request:
    scope = {"type": "http", "method": "GET", "path": "/a", "query_string": b"", "headers": []}
    return Request({**scope, "client": (address, 1)})


def test_a_flood_of_refusals_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "twinkle.gateway")
    now = 0.0
    refusals = Refusals(lambda: now)
    for _ in range(100):
        refusals.add(request("10.0.0.1"), 429, "too many")
    refusals.add(request("10.0.0.1"), 404, "not there")
    refusals.add(request("10.0.0.2"), 429, "too many")
    now += REFUSAL_SECONDS
    refusals.add(request("10.0.0.1"), 429, "too many")
    assert [message for message, _ in said(caplog)] == [
        "refused GET /a: too many",
        "refused GET /a: not there",
        "refused GET /a: too many",
        "refused GET /a: too many (and 99 more of this kind before it)",
    ]
