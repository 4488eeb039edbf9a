"""Bytes travel once: the journal has bodies as they were received and results as they are sent, and no keys."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import MODEL
from restarted_service import Server

from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.endpoints import PREFIX, PROTOBUF
from twinkle.protocol.operations import ENDPOINTS, Posted, Reply
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import operations as gateway_operations
from twinkle.server.gateway.app import create_app
from twinkle.server.scheduling import records
from twinkle.server.scheduling.records import Accepted, Done
from twinkle.server.store import journal_segment
from twinkle.server.tokens import Signer

ALICE = {"X-API-Key": "alice"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path)
    await server.start()
    yield server
    await server.close()


def gateway(server: Server) -> httpx.AsyncClient:
    app = create_app(server.service, LimitsSection(), Signer("a secret that is long enough for it"))
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}", headers=ALICE)


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway(server) as client:
        yield client


def written(server: Server) -> list[records.Record]:
    """The journal's records."""
    found: list[records.Record] = []
    for path in sorted((server.directory / "journal").glob("*.log")):
        data = path.read_bytes()
        header = journal_segment.read_header(data[: journal_segment.HEADER_BYTES])
        assert header is not None
        found += [records.decode(payload) for payload in journal_segment.parse(data, header[0]).payloads]
    return found


def bodies(server: Server, path: str) -> list[bytes | None]:
    return [each.body for each in written(server) if isinstance(each, Accepted) and each.path == path]


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> Any:
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def result(http: httpx.AsyncClient, promise: Any) -> Any:
    return await post(http, "/retrieve_future", request_id=promise["request_id"])


async def new_run(http: httpx.AsyncClient) -> str:
    session = (await post(http, "/create_session"))["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 2}}
    return (await result(http, await post(http, "/create_model", **body)))["model_id"]


async def new_sampler(http: httpx.AsyncClient) -> str:
    session = (await post(http, "/create_session"))["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    return (await post(http, "/create_sampling_session", **body))["sampling_session_id"]


def a_pass(run: str, seq_id: int) -> bytes:
    """A pass, with a field that this version doesn't know."""
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    body = codec.encode_forward_backward(m.ForwardBackwardRequest(run, seq_id, [datum], "cross_entropy"))
    return body + b"\xc0\x3e\x01"


def a_step(run: str, seq_id: int) -> bytes:
    return json.dumps({"seq_id": seq_id, "later_field": 1, "model_id": run}, indent=4).encode()


def a_sample(sampler: str, seq_id: int = 0, **more: Any) -> bytes:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    values = {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt, "num_samples": 1}
    return json.dumps({"sampling_params": {"max_tokens": 3}, **values, **more}).encode()


async def together(http: httpx.AsyncClient, *sent: tuple[str, bytes]) -> list[Reply]:
    body = operations.encode_request([Posted(ENDPOINTS[path], body) for path, body in sent])
    response = await http.post(operations.PATH, content=body)
    assert response.status_code == 200, response.text
    return operations.decode_reply(response.content)


class Encodings(Counter[str]):
    """Counts by name what is encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name in ("forward_backward", "forward_backward_output", "sample", "json"):
            self._count(monkeypatch, f"encode_{name}")

    def _count(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        plain = getattr(codec, name)

        def counted(message: Any) -> bytes:
            self[f"{name} {type(message).__name__}"] += 1
            return plain(message)

        monkeypatch.setattr(codec, name, counted)


async def test_a_step_is_written_as_it_was_received_and_its_results_as_they_are_sent(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    run = await new_run(http)
    passed, stepped = a_pass(run, 1), a_step(run, 2)
    encodings = Encodings(monkeypatch)
    replies = await together(http, ("/forward_backward", passed), ("/optim_step", stepped))
    again = [
        await http.post("/retrieve_future", json={"request_id": reply.request_id}, headers={"Accept": "*/*"})
        for reply in replies
    ]
    assert encodings == {
        "encode_forward_backward_output ForwardBackwardOutput": 1,
        "encode_json OptimStepResponse": 1,
    }
    assert bodies(server, "/forward_backward") == [passed] and bodies(server, "/optim_step") == [stepped]
    outcomes = {
        name: body
        for record in written(server)
        if isinstance(record, Done)
        for name, _, body in record.outcomes
    }
    for reply, poll in zip(replies, again, strict=True):
        assert reply.status == 200 and reply.body == outcomes[reply.request_id] == poll.content


async def test_a_sample_and_a_failure_are_encoded_once(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    sampler, run = await new_sampler(http), await new_run(http)
    encodings = Encodings(monkeypatch)
    lost = json.dumps({"model_id": run, "seq_id": 1, "path": f"tinker://{run}/weights/not-there"}).encode()
    sampled, failed = await together(http, ("/asample", a_sample(sampler)), ("/load_weights", lost))
    assert sampled.content_type == PROTOBUF
    assert codec.decode_sample(sampled.body).sequences[0].stop_reason == "length"
    assert "not-there" in json.loads(failed.body)["error"]
    assert await together(http, ("/asample", a_sample(sampler))) == [sampled]
    encodings.pop("encode_json LoadWeightsRequest")  # it may hold a key
    assert encodings == {"encode_sample SampleResponse": 1, "encode_json Failure": 1}
    assert bodies(server, "/asample") == [a_sample(sampler)]


@pytest.mark.parametrize(
    "field",
    [
        '"weights_access_token": "tml-secret"',
        '"weights_access_token": "tml-secret", "weights_access_token": null',
        '"\\u0077eights_access_token": "tml-secret"',
        '"weights_access_tokens": "tml-secret"',
    ],
)
async def test_no_key_is_written_however_it_is_sent(server: Server, http: httpx.AsyncClient, field: str):
    run = await new_run(http)
    body = f'{{"model_id": "{run}", "seq_id": 1, "path": "tinker://{run}/weights/x", {field}}}'
    response = await http.post("/load_weights", content=body)
    assert "error" in await result(http, response.json())
    [kept] = bodies(server, "/load_weights")
    assert kept is not None and b"weights/x" in kept
    assert all(b"tml-secret" not in path.read_bytes() for path in (server.directory / "journal").iterdir())


async def test_a_retry_that_is_encoded_differently_is_the_same_also_after_a_restart(
    server: Server, http: httpx.AsyncClient
):
    run = await new_run(http)
    [first] = await together(http, ("/forward_backward", a_pass(run, 1)))
    other = pb.ForwardBackwardRequest.FromString(a_pass(run, 1))
    other.DiscardUnknownFields()
    other.data[0].loss_fn_inputs["weights"].dense = b"\x00\x00\x80\x3f" * 2
    assert other.SerializeToString() != a_pass(run, 1)
    assert await together(http, ("/forward_backward", other.SerializeToString())) == [first]
    await server.kill_and_start()
    async with gateway(server) as later:
        assert await together(later, ("/forward_backward", other.SerializeToString())) == [first]
        other.data[0].loss_fn_inputs["weights"].dense = b"\x00\x00\x00\x00" * 2
        [refused] = await together(later, ("/forward_backward", other.SerializeToString()))
    assert refused.status == 409 and b"asks for something else" in refused.body


async def test_what_was_received_is_what_is_done_after_a_restart(server: Server, http: httpx.AsyncClient):
    run, sampler = await new_run(http), await new_sampler(http)
    server.worker.hangs = lambda _method: True  # nothing that is accepted is done
    path = {"/forward_backward": a_pass(run, 1), "/optim_step": a_step(run, 2), "/asample": a_sample(sampler)}
    promises = [(await http.post(name, content=body)).json() for name, body in path.items()]
    await server.kill_and_start()
    async with gateway(server) as later:
        replies = await together(later, *path.items())
    assert [reply.request_id for reply in replies] == [promise["request_id"] for promise in promises]
    assert [reply.status for reply in replies] == [200] * 3
    assert codec.decode_sample(replies[2].body).sequences[0].stop_reason == "length"


async def test_a_slow_sample_is_pending_in_its_reply_and_there_when_it_is_polled_for(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway_operations, "LONG_POLL_SECONDS", 0.05)
    monkeypatch.setattr(gateway_operations, "_UNWATCHED_SECONDS", 0.01)
    sampler = await new_sampler(http)
    server.worker.hangs = lambda method: method == "generate"
    [reply] = await together(http, ("/asample", a_sample(sampler)))
    assert (reply.status, json.loads(reply.body)["request_id"]) == (408, reply.request_id)
    assert (await http.post("/cancel_future", json={"request_id": reply.request_id})).status_code == 200
    assert "cancelled" in (await result(http, {"request_id": reply.request_id}))["error"]


async def test_a_large_result_is_left_to_a_poll(
    server: Server, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway_operations, "INLINE_BYTES", 100)
    sampler = await new_sampler(http)
    small, large = await together(
        http,
        ("/asample", a_sample(sampler)),
        ("/asample", a_sample(sampler, 1, topk_sample_logprobs=8)),
    )
    assert (small.status, large.status) == (200, 408)
    fetched = await http.post("/retrieve_future", json={"request_id": large.request_id})
    assert fetched.headers["content-type"] == PROTOBUF and len(fetched.content) > 100
