"""A request that waits ends with its connection: the server that reads HTTP itself says so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import MODEL
from mortal_worker import MortalWorker, make_mortal_service
from starlette.requests import ClientDisconnect, Request

from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.operations import ENDPOINTS, PATH, Posted, encode_request
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import hang_ups
from twinkle.server.gateway import operations as gateway_operations
from twinkle.server.gateway.app import create_app
from twinkle.server.serve.http import HttpServer
from twinkle.server.tokens import Signer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_operations, "_UNWATCHED_SECONDS", 0.01)


def request_of(messages: asyncio.Queue[dict[str, Any]]) -> Request:
    return Request({"type": "http", "headers": []}, messages.get)


async def test_what_is_done_in_time_is_returned_and_errors_are_raised():
    request = request_of(asyncio.Queue())

    async def late(result: int) -> int:
        await asyncio.sleep(0.03)
        if result < 0:
            raise ValueError("negative")
        return result

    assert await hang_ups.while_connected(request, late(3)) == 3
    assert await hang_ups.while_connected(request, asyncio.sleep(0, 4)) == 4
    with pytest.raises(ValueError, match="negative"):
        await hang_ups.while_connected(request, late(-1))


async def test_what_nobody_waits_for_is_cancelled():
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    ended = asyncio.Event()

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.create_task(hang_ups.while_connected(request_of(messages), never()))
    await asyncio.sleep(0.03)
    assert not ended.is_set()
    await messages.put({"type": "http.disconnect"})
    with pytest.raises(ClientDisconnect):
        await waiting
    assert ended.is_set()


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("by", ["future", "sampler", "operations"])
async def test_a_client_that_is_killed_while_it_waits_is_no_longer_there(
    tmp_path: Path, by: str, caplog: Any
):
    worker = MortalWorker()
    service = make_mortal_service(tmp_path, worker, 3600.0)
    await service.start()
    worker.hangs = lambda method: method == "generate"
    server = await HttpServer.start(
        create_app(service, LimitsSection(), Signer("a secret that is long enough for it")), "127.0.0.1", 0
    )
    port = server._server.servers[0].sockets[0].getsockname()[1]
    presence = service._sessions._presence
    async with asyncio.timeout(60):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}{PREFIX}") as http:

            async def post(path: str, **body: Any) -> Any:
                response = await http.post(path, json=body)
                assert response.status_code == 200, response.text
                return response.json()

            session = (await post("/create_session"))["session_id"]
            sampler = (
                await post(
                    "/create_sampling_session",
                    session_id=session,
                    sampling_session_seq_id=0,
                    base_model=MODEL,
                )
            )["sampling_session_id"]
            prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
            sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "num_samples": 1}
            sample["sampling_params"] = {"max_tokens": 5}
            promise = await post("/asample", **sample)
            target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
            posted = Posted(ENDPOINTS["/asample"], json.dumps({**sample, "seq_id": 1}).encode())
            path, body = {
                "future": ("/retrieve_future", json.dumps({"request_id": promise["request_id"]})),
                "sampler": ("/retrieve_futures", json.dumps({"target": target, "prev_cursor": 0})),
                "operations": (PATH, encode_request([posted])),
            }[by]
            polling = asyncio.create_task(http.post(path, content=body, timeout=60))
            await until(lambda: presence._waiting[session] == 1)
            await asyncio.sleep(0.03)
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
        await until(lambda: not presence._waiting)
    assert "error id" not in caplog.text
    worker.hangs = lambda _method: False
    await server.close()
    await service.close()
