"""HTTP in, HTTP out, on a whole service with the fake backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fake_service import MODEL, make_service

from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import OPERATIONS, PREFIX, PROTOBUF, QUERIES
from twinkle.protocol.operations import ENDPOINTS, Posted, Reply
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.config import LimitsSection
from twinkle.server.gateway.app import create_app
from twinkle.server.tokens import Signer

MAX_BYTES = 100_000


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    service = make_service(tmp_path)
    await service.start()
    transport = httpx.ASGITransport(
        create_app(service, LimitsSection(max_request_bytes=MAX_BYTES), Signer("secret")),
        raise_app_exceptions=False,
    )
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield client
    await service.close()


async def new_run(http: httpx.AsyncClient, **headers: str) -> str:
    session = (await http.post("/create_session", json={}, headers=headers)).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 2}}
    promise = (await http.post("/create_model", json=body, headers=headers)).json()
    assert isinstance(promise["request_id"], str)
    result = await http.post("/retrieve_future", json={"request_id": promise["request_id"]}, headers=headers)
    return result.json()["model_id"]


def a_pass(run: str, seq_id: int = 1) -> bytes:
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    return codec.encode_forward_backward(m.ForwardBackwardRequest(run, seq_id, [datum], "cross_entropy"))


async def test_the_routes_are_the_protocols_tables_and_a_handful(http: httpx.AsyncClient, tmp_path: Path):
    app = create_app(make_service(tmp_path), LimitsSection(max_request_bytes=MAX_BYTES), Signer("secret"))
    routes = {
        (method, path)
        for route in app.routes
        if (path := getattr(route, "path", "")).startswith(PREFIX)
        for method in (getattr(route, "methods", None) or set()) - {"HEAD"}
    }
    expected = {("POST", PREFIX + endpoint.path) for endpoint in OPERATIONS}
    expected |= {(query.method, PREFIX + query.path) for query in QUERIES}
    expected |= {
        ("GET", PREFIX + path)
        for path in ("/healthz", "/readyz", m.CHECKPOINT + "/archive", "/download/{token}/{name}")
    }
    expected |= {
        ("POST", f"{PREFIX}/{path}")
        for path in (
            "retrieve_future",
            "operations",
            "client/config",
            "client/dynamic_config",
            "auth/token",
            "telemetry",
        )
    }
    assert routes == expected


async def test_a_compressed_pass_is_answered_in_protobuf(http: httpx.AsyncClient):
    run = await new_run(http)
    response = await http.post(
        "/forward_backward",
        content=codec.compress(a_pass(run)),
        headers={"Content-Type": PROTOBUF, "Content-Encoding": "zstd"},
    )
    assert response.status_code == 200, response.text
    result = await http.post("/retrieve_future", json={"request_id": response.json()["request_id"]})
    assert result.headers["content-type"] == PROTOBUF
    output = codec.decode_forward_backward_output(result.content)
    assert output.loss_fn_outputs[0]["logprobs"].shape == [2]


async def post_together(http: httpx.AsyncClient, *sent: tuple[str, bytes], **headers: str) -> list[Reply]:
    posted = [Posted(ENDPOINTS[path], body) for path, body in sent]
    response = await http.post(operations.PATH, content=operations.encode_request(posted), headers=headers)
    assert response.status_code == 200, response.text
    return operations.decode_reply(response.content)


def a_step(run: str, seq_id: int) -> bytes:
    return codec.encode_json(m.OptimStepRequest(model_id=run, seq_id=seq_id))


async def test_operations_sent_together_are_answered_as_each_would_be(http: httpx.AsyncClient):
    run = await new_run(http)
    passed, stepped = await post_together(
        http, ("/forward_backward", a_pass(run)), ("/optim_step", a_step(run, 2))
    )
    for reply in (passed, stepped):
        alone = await http.post("/retrieve_future", json={"request_id": reply.request_id})
        assert (reply.status, reply.content_type, reply.body) == (
            alone.status_code,
            alone.headers["content-type"],
            alone.content,
        )
    again = await post_together(http, ("/forward_backward", a_pass(run)), ("/optim_step", a_step(run, 2)))
    assert again == [passed, stepped]  # sent twice, done once


async def test_of_operations_sent_together_only_the_one_at_fault_is_refused(http: httpx.AsyncClient):
    run = await new_run(http)
    unreadable, strange, stepped = await post_together(
        http,
        ("/forward_backward", a_pass(run).replace(b"cross_entropy", b"cross_entropi")),
        ("/optim_step", b"{"),
        ("/optim_step", a_step(run, 2)),
    )
    assert (unreadable.status, strange.status, stepped.status) == (400, 400, 200)
    assert unreadable.request_id == strange.request_id == ""
    assert b"cross_entropi" in unreadable.body


async def test_operations_of_another_tenants_run_are_not_found(http: httpx.AsyncClient):
    run = await new_run(http, **{"X-API-Key": "alice"})
    [reply] = await post_together(http, ("/optim_step", a_step(run, 1)), **{"X-API-Key": "bob"})
    assert reply.status == 404 and run.encode() in reply.body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff\xff\xff", 400),
        (operations.pb.OperationsRequest(operations=[{"path": "/create_model"}]).SerializeToString(), 400),
        (operations.pb.OperationsRequest(operations=[{"path": "/optim_step"}] * 33).SerializeToString(), 413),
    ],
)
async def test_what_can_not_be_sent_together_is_refused_as_a_whole(
    http: httpx.AsyncClient, body: bytes, status: int
):
    response = await http.post(operations.PATH, content=body)
    assert response.status_code == status
    assert "operations" in response.json()["error"].lower()


async def test_bodies_over_the_limit_are_refused_compressed_or_not(http: httpx.AsyncClient):
    for body, headers in (
        (b"x" * (MAX_BYTES + 1), {}),
        (codec.compress(b"x" * (MAX_BYTES + 1)), {"Content-Encoding": "zstd"}),
    ):
        response = await http.post("/forward_backward", content=body, headers=headers)
        assert response.status_code == 413
        assert "send fewer datums" in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/create_model", b"{", "body"),
        ("/create_model", b"{}", "session_id: Field required"),
        ("/optim_step", b'{"model_id": "x", "seq_id": "one"}', "seq_id: "),
        (
            "/asample",
            b'{"sampling_session_id":"s","seq_id":0,"prompt":{"chunks":[{"type":"image"}]}}',
            "read text only",
        ),
        ("/forward_backward", b"\xff\xff\xff", "body: not a protobuf"),
        ("/create_session", b"[]", "JSON object"),
    ],
)
async def test_what_cannot_be_read_is_said_with_its_field(
    http: httpx.AsyncClient, path: str, body: bytes, message: str
):
    response = await http.post(path, content=body)
    assert response.status_code in (400, 404), response.text
    if response.status_code == 400:
        assert message in response.json()["error"]
        assert response.json()["category"] == "user"


async def test_an_unknown_path_is_named(http: httpx.AsyncClient):
    response = await http.post("/no_such_thing")
    assert response.status_code == 404
    assert response.json() == {
        "error": "POST /api/v1/no_such_thing is not offered by this server",
        "category": "user",
    }


async def test_keys_are_tenants_in_either_header(http: httpx.AsyncClient):
    run = await new_run(http, **{"X-API-Key": "alice"})
    mine = await http.post("/get_info", json={"model_id": run}, headers={"Authorization": "Bearer alice"})
    assert mine.json()["model_data"]["model_name"] == MODEL
    for headers in ({}, {"X-API-Key": "bob"}, {"Authorization": "Bearer bob"}):
        assert (await http.post("/get_info", json={"model_id": run}, headers=headers)).status_code == 404


async def test_a_key_is_nowhere_in_the_store(http: httpx.AsyncClient, tmp_path: Path):
    await new_run(http, **{"X-API-Key": "very-secret-key"})
    written = b"".join(path.read_bytes() for path in tmp_path.glob("test.sqlite*"))
    assert b"t-" in written and b"very-secret-key" not in written


async def test_lists_are_paged(http: httpx.AsyncClient):
    runs = [await new_run(http) for _ in range(3)]
    page = (await http.get("/training_runs", params={"limit": 2, "offset": 1})).json()
    assert page["cursor"] == {"offset": 1, "limit": 2, "total_count": 3}
    assert [run["training_run_id"] for run in page["training_runs"]] == [runs[1], runs[0]]
    assert (await http.get("/training_runs", params={"limit": -1})).status_code == 400


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that takes one request in ten seconds."""
    service = make_service(tmp_path)
    await service.start()
    limits = LimitsSection(max_requests_per_second_per_tenant=0.1)
    transport = httpx.ASGITransport(create_app(service, limits, Signer("secret")))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as client:
        yield client
    await service.close()


async def test_a_request_too_many_is_told_which_limit_and_when_to_try_again(limited: httpx.AsyncClient):
    alice, bob = {"x-api-key": "a"}, {"x-api-key": "b"}
    replies = [await limited.post("/create_session", json={}, headers=alice) for _ in range(3)]
    # One at once, another that overdraws by what it has not earned yet, and then ten seconds have to be waited for.
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    refused = replies[-1]
    assert refused.json()["error"].startswith("limits.max_requests_per_second_per_tenant: 0.1 is the most")
    assert 5 < float(refused.headers["retry-after"]) <= 20
    assert (await limited.post("/auth/token", json={}, headers=alice)).status_code == 429
    assert (await limited.post("/create_session", json={}, headers=bob)).status_code == 200
    assert (await limited.get("/healthz", headers=alice)).status_code == 200


async def test_a_run_too_many_is_403_by_name(tmp_path: Path):
    service = make_service(tmp_path, limits=LimitsSection(max_runs_per_tenant=1))
    await service.start()
    transport = httpx.ASGITransport(create_app(service, LimitsSection(), Signer("secret")))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://test{PREFIX}") as http:
        await new_run(http)
        session = (await http.post("/create_session", json={})).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 2}}
        refused = await http.post("/create_model", json=body)
    await service.close()
    assert refused.status_code == 403 and refused.json()["category"] == "user"
    assert refused.json()["error"].startswith("limits.max_runs_per_tenant: 1 training runs take requests")


async def test_a_number_that_was_used_for_something_else_is_409_and_not_tried_again(http: httpx.AsyncClient):
    run = await new_run(http)
    first = (await http.post("/forward_backward", content=a_pass(run))).json()
    [together] = await post_together(http, ("/forward_backward", a_pass(run)))
    compressed = await http.post(
        "/forward_backward", content=codec.compress(a_pass(run)), headers={"Content-Encoding": "zstd"}
    )
    assert first["request_id"] == together.request_id == compressed.json()["request_id"]
    datum = Datum(ModelInput.from_ints([9, 9]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    other = codec.encode_forward_backward(m.ForwardBackwardRequest(run, 1, [datum], "cross_entropy"))
    refused = await http.post("/forward_backward", content=other)
    assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
    assert refused.json()["error"].startswith("seq_id: 1 was used before on this run")
    [together] = await post_together(http, ("/forward_backward", other))
    assert together.status == 409
    session = run.split(":")[0]
    body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 2}}
    assert (await http.post("/create_model", json=body)).json()["model_id"] == run
    body["lora_config"] = {"rank": 3}
    assert (await http.post("/create_model", json=body)).status_code == 409
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    for _ in range(2):
        assert (await http.post("/create_sampling_session", json=sampler)).status_code == 200
