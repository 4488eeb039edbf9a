"""Bodies that are made to take memory, time or places: bounded for each tenant and for all, and off the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard
from fake_service import MODEL, Tenant, make_service
from starlette.applications import Starlette

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import http as gateway_http
from twinkle.server.gateway.app import create_app
from twinkle.server.tokens import Signer, tenant_of_key

ZSTD = {"Content-Encoding": "zstd"}
PART = 2**16


class Gateway:
    """A service with the fake backend behind its application."""

    def __init__(self, directory: Path, **limits: Any) -> None:
        self.limits = LimitsSection(**limits)
        self.service = make_service(directory, limits=self.limits)
        self.app = create_app(self.service, self.limits, Signer("secret"))

    def client(self, key: str = "a") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(
            transport=transport, base_url="http://test" + PREFIX, headers={"X-API-Key": key}
        )

    async def sampler(self, key: str = "a") -> str:
        tenant = Tenant(self.service, tenant_of_key(key))
        request = m.CreateSamplingSessionRequest(
            session_id=await tenant.session(), sampling_session_seq_id=0, base_model=MODEL
        )
        return (await tenant.ask(request)).sampling_session_id


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    started: list[Gateway] = []

    async def start(**limits: Any) -> Gateway:
        gateway = Gateway(tmp_path, **limits)
        started.append(gateway)
        await gateway.service.start()
        return gateway

    yield start
    for gateway in started:
        await gateway.service.close()


def a_sample(sampler: str, tokens: str = "1,2", more: str = "") -> bytes:
    begin = f'{{"sampling_session_id":"{sampler}","seq_id":0,"sampling_params":{{"max_tokens":1}},'
    prompt = f'"prompt":{{"chunks":[{{"type":"encoded_text","tokens":[{tokens}]}}]}}'
    return f"{begin}{prompt}{more}}}".encode()


def streamed(body: bytes) -> bytes:
    """Compressed by one who doesn't say how much it is."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(body) + compressor.flush()


@pytest.mark.parametrize("compress", [codec.compress, streamed], ids=["said", "not said"])
@pytest.mark.parametrize("filling", ["1,", "[],"])
async def test_a_few_bytes_that_become_many_millions_are_refused_unread(
    start: Callable[..., Any], compress: Callable[[bytes], bytes], filling: str
):
    gateway = await start()
    sampler = await gateway.sampler()
    many = 20_000_000 // len(filling)
    for body in (
        a_sample(sampler, more=f',"unknown":[{filling * many}1]'),
        a_sample(sampler, tokens=filling * many + "1"),
    ):
        sent = compress(body)
        assert len(sent) < 20_000
        del body
        async with gateway.client() as http:
            tracemalloc.start()
            response = await http.post("/asample", content=sent, headers=ZSTD)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert response.status_code == 413, response.text
        assert peak < 32 * 2**20


@pytest.mark.parametrize(
    ("path", "filling"),
    [
        ("/asample", '{"type":"encoded_text","tokens":[1]},' * 20_000),
        ("/asample", "[]," * 1_300_000),
        ("/create_custom_loss", "[]," * 100_000),
        ("/create_custom_loss", '{"a":1},' * 20_000),
        ("/create_session", "1," * 200_000),
        ("/sessions/search", "{}," * 50_000),
        ("/retrieve_future", "1," * 200_000),
    ],
)
async def test_json_of_more_values_than_it_can_mean_is_not_parsed(
    start: Callable[..., Any], path: str, filling: str, monkeypatch: pytest.MonkeyPatch
):
    gateway = await start()

    def parse(*_: object) -> None:
        raise AssertionError("it was parsed")

    for name in ("decode_json", "decode_query"):
        monkeypatch.setattr(codec, name, parse)
    async with gateway.client() as http:
        response = await http.post(path, content=f'{{"x":[{filling}{{}}]}}'.encode())
    assert response.status_code == 413 and " values, more than" in response.text.replace("objects", "values")


async def test_the_longest_prompt_with_a_target_at_each_token_is_read(start: Callable[..., Any]):
    gateway = await start()
    sampler = await gateway.sampler()
    longest = gateway.service._worker.info.max_context_length - 1  # pyright: ignore[reportPrivateUsage]
    wide = 2**20 // (longest - 1)
    targets = np.full((longest - 1, wide), 100, np.int64)
    values = {"dtype": "int64", "shape": list(targets.shape), "data": targets.ravel().tolist()}
    more = f',"prompt_logprobs":true,"target_prompt_logprobs":{json.dumps(values)}'
    body = a_sample(sampler, ", ".join(["100"] * longest), more)
    async with gateway.client() as http:
        response = await http.post("/asample", content=codec.compress(body), headers=ZSTD)
    assert response.status_code == 200, response.text


# ---------------------------------------------------------------- bodies that never end


class Slow:
    """A request whose body comes as far as it is let."""

    def __init__(self, app: Starlette, key: str, length: int, path: str = "/forward_backward") -> None:
        self._parts: asyncio.Queue[bytes] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        headers = [(b"x-api-key", key.encode()), (b"content-type", b"application/x-protobuf")]
        if length:
            headers.append((b"content-length", str(length).encode()))
        scope = {
            "type": "http",
            "method": "POST",
            "path": PREFIX + path,
            "raw_path": (PREFIX + path).encode(),
            "query_string": b"",
            "headers": headers,
            "root_path": "",
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        part = await self._parts.get()
        return (
            {"type": "http.request", "body": part, "more_body": True} if part else {"type": "http.disconnect"}
        )

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def send(self, count: int) -> None:
        for _ in range(count):
            self._parts.put_nowait(bytes(PART))
        while not self._parts.empty() and not self.task.done():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def hang_up(self) -> None:
        self._parts.put_nowait(b"")
        await asyncio.wait([self.task])

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


@pytest.mark.parametrize("says_length", [True, False])
async def test_bodies_but_for_the_last_byte_hold_no_more_than_the_budget(
    start: Callable[..., Any], says_length: bool, monkeypatch: pytest.MonkeyPatch
):
    made: list[gateway_http.Bodies] = []
    init = gateway_http.Bodies.__init__

    def note(self: gateway_http.Bodies, limits: LimitsSection) -> None:
        made.append(self)
        init(self, limits)

    monkeypatch.setattr(gateway_http.Bodies, "__init__", note)
    gateway = await start(max_body_bytes_per_tenant=40 * PART, max_body_bytes=60 * PART)
    length = 32 * PART if says_length else 0
    attack = [Slow(gateway.app, "attacker", length) for _ in range(10)]
    for slow in attack:
        await slow.send(31)
        assert made[0].bytes_held <= 40 * PART
    assert [slow.status for slow in attack] == [None] + [429] * 9
    assert b"retry-after" in attack[1].headers
    # What is left for others is theirs.
    other = Slow(gateway.app, "other", length and 24 * PART)
    await other.send(20)
    assert other.status is None and made[0].bytes_held == 51 * PART
    third = Slow(gateway.app, "third", length)
    await third.send(20)
    assert third.status == 429
    # A small one is taken even where nothing is left.
    fourth = Slow(gateway.app, "fourth", 0)
    await fourth.send(10)
    assert fourth.status == 429 and made[0].bytes_held == 51 * PART
    filler = Slow(gateway.app, "filler", 0)
    await filler.send(9)
    assert filler.status is None and made[0].bytes_held == 60 * PART
    async with gateway.client("fifth") as http:
        assert (await http.post("/create_session", json={})).status_code == 200
    await filler.hang_up()
    for slow in (attack[0], other):
        await slow.hang_up()
    assert made[0].bytes_held == 0


async def test_a_body_that_comes_too_slowly_ends_and_a_long_one_that_comes_does_not(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway_http, "PART_SECONDS", 0.2)
    monkeypatch.setattr(gateway_http, "PART_BYTES", 2 * PART)
    gateway = await start()
    slow, steady = Slow(gateway.app, "a", 0), Slow(gateway.app, "b", 0)
    await slow.send(1)
    while not slow.task.done():
        await steady.send(2)
        await asyncio.sleep(0.01)
    assert slow.status == 408 and slow.headers[b"connection"] == b"close"
    assert b"it comes too slowly" in slow.sent[1]["body"]
    assert steady.status is None
    await steady.hang_up()


async def test_a_body_has_an_end_though_it_comes(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway_http, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(gateway_http, "PART_BYTES", PART)
    steady = Slow((await start()).app, "a", 0)
    while not steady.task.done():
        await steady.send(1)
        await asyncio.sleep(0.01)
    assert steady.status == 408


async def test_a_client_that_hangs_up_leaves_no_line_in_the_log(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
):
    gateway = await start()
    for path in ("/forward_backward", "/operations", "/create_session", "/retrieve_future"):
        gone = Slow(gateway.app, "a", 0, path)
        await gone.send(1)
        await gone.hang_up()
        assert gone.task.exception() is None
    assert [record for record in caplog.records if record.name.startswith("twinkle")] == []


# ---------------------------------------------------------------- off the event loop


def a_pass(run: str, datums: int) -> bytes:
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    request = m.ForwardBackwardRequest(run, 1, [datum] * datums, "cross_entropy")
    return codec.encode_forward_backward(request)


async def test_large_bodies_are_decoded_in_threads_one_at_a_time_for_each_tenant(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    gateway = await start()
    decode, main = codec.decode_forward_backward, threading.current_thread()
    under_way: dict[str, int] = {}
    most: dict[str, int] = {}
    where: list[bool] = []
    lock, together = threading.Lock(), threading.Barrier(2, timeout=20)

    def slow(body: bytes) -> m.ForwardBackwardRequest:
        request = decode(body)
        where.append(threading.current_thread() is main)
        if where[-1]:
            return request
        with lock:
            under_way[request.model_id] = under_way.get(request.model_id, 0) + 1
            most[request.model_id] = max(most.get(request.model_id, 0), under_way[request.model_id])
        together.wait()  # goes on when two are being decoded: of two tenants
        with lock:
            under_way[request.model_id] -= 1
        return request

    monkeypatch.setattr(codec, "decode_forward_backward", slow)
    async with gateway.client("a") as a, gateway.client("b") as b:
        large = [
            client.post("/forward_backward", content=a_pass(name, 2000))
            for _ in range(3)
            for client, name in ((a, "run-a"), (b, "run-b"))
        ]
        assert {response.status_code for response in await asyncio.gather(*large)} == {404}
        assert most == {"run-a": 1, "run-b": 1} and where == [False] * 6
        assert (await a.post("/forward_backward", content=a_pass("run-a", 8))).status_code == 404
    assert where[-1]  # a small one is not worth the way


async def test_json_for_a_training_pass_says_which_sdks_send_something_else(start: Callable[..., Any]):
    gateway = await start()
    async with gateway.client() as http:
        response = await http.post("/forward_backward", content=b' {"model_id": "x", "seq_id": 1}')
    assert response.status_code == 400
    assert "application/x-protobuf" in response.text and "0.22" in response.text
