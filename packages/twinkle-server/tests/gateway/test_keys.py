"""Only those are let in that hold a key, and they find what is theirs: on every route that there is."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import MODEL
from keyed_gateway import Belongings, KeyedGateway, make_belongings

from twinkle.protocol import messages as m
from twinkle.protocol import operations
from twinkle.protocol.endpoints import OPERATIONS, PREFIX, QUERIES
from twinkle.protocol.operations import ENDPOINTS, Posted
from twinkle.server import keys
from twinkle.server.keys import KeyRing, create_key, revoke_key
from twinkle.server.serve.http import HttpServer
from twinkle.server.store.database import Database

# Open to everybody, and why.
PUBLIC = {
    ("GET", PREFIX + "/healthz"): "says nothing but that the process is there",
    ("GET", PREFIX + "/readyz"): "says nothing but whether requests are taken",
    ("GET", "/livez"): "as healthz",
    ("GET", "/readyz"): "as above",
    ("POST", PREFIX + "/client/config"): "is the same for all, and asked for before there is a token",
    ("POST", PREFIX + "/client/dynamic_config"): "is the same for all",
    ("POST", PREFIX + "/telemetry"): "is dropped unread",
    ("GET", "/openapi.json"): "describes the program, not what is in it",
    ("GET", PREFIX + "/download/{token}/{name}"): "the address is signed, and is the key",
}

# Name nothing of anybody's: they answer from what is the caller's own, and what the owner has must not be in it.
OWN = {
    ("POST", PREFIX + "/create_session"),
    ("GET", PREFIX + "/get_server_capabilities"),
    ("GET", PREFIX + "/training_runs"),
    ("GET", PREFIX + "/checkpoints"),
    ("GET", PREFIX + "/sessions"),
    ("POST", PREFIX + "/sessions/search"),
    ("GET", PREFIX + "/auth/apikey/me"),
    ("GET", PREFIX + "/audit"),
    ("GET", "/metrics"),
    ("GET", PREFIX + "/billing/usage/events"),
    ("GET", PREFIX + "/billing/usage/checkpoints/current"),
    ("POST", PREFIX + "/auth/token"),
    ("DELETE", PREFIX + "/auth/apikey/me"),
    # A model's tokenizer is everybody's; the fake model has none.
    ("GET", PREFIX + "/tokenizer_urls"),
    # Done whether there is such a request or not; another's is left alone.
    ("POST", PREFIX + "/cancel_future"),
    # One reply for several operations: each has its own status, which is looked at.
    ("POST", PREFIX + operations.PATH),
}

# What requests need beside the names of things.
PLAIN: dict[str, Any] = {
    "seq_id": 1,
    "model_seq_id": 1,
    "sampling_session_seq_id": 1,
    "custom_loss_seq_id": 0,
    "base_model": MODEL,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "inputs": [],
    "graph": {"nodes": []},
    "ttl_seconds": 60,
    "project_id": "project",
    "starting_on": "2026-01-01T00:00:00Z",
    "ending_before": "2026-01-02T00:00:00Z",
}


@pytest.fixture
async def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KeyedGateway]:
    monkeypatch.setattr(keys, "_UNKNOWN_AGAIN", 0.001)  # hundreds of wrong keys are tried here
    monkeypatch.setattr(keys, "_REVOKED_WITHIN", 0.2)
    gateway = KeyedGateway(tmp_path)
    await gateway.service.start()
    yield gateway
    await gateway.service.close()


def routes(gateway: KeyedGateway) -> list[tuple[str, str]]:
    return [
        (method, getattr(route, "path", ""))
        for route in gateway.app.routes
        for method in sorted((getattr(route, "methods", None) or set()) - {"HEAD"})
    ]


def request_to(route: tuple[str, str], of: Belongings) -> dict[str, Any]:
    """A request that would be done if it came from the owner; a route that isn't known here is a KeyError."""
    method, path = route
    url = re.sub(r"{(\w+)}", lambda name: str(of.names[name[1]]), path)
    if path == PREFIX + "/forward_backward":
        return {"method": method, "url": url, "content": of.a_pass}
    if path == PREFIX + operations.PATH:
        posted = [Posted(ENDPOINTS["/forward_backward"], of.a_pass)]
        return {"method": method, "url": url, "content": operations.encode_request(posted)}
    if path in ("/metrics", PREFIX + "/auth/token", PREFIX + m.CHECKPOINT + "/archive"):
        return {"method": method, "url": url}
    messages: dict[Any, Any] = {("POST", PREFIX + endpoint.path): endpoint.request for endpoint in OPERATIONS}
    messages |= {(query.method, PREFIX + query.path): query for query in QUERIES}
    messages[("POST", PREFIX + "/retrieve_future")] = m.RetrieveFutureRequest
    message = messages[route]
    values = {**PLAIN, **of.names}
    body = {
        name: values[name]
        for name, field in message.model_fields.items()
        if "{" + name + "}" not in path and field.is_required()
    }
    if path == PREFIX + "/load_weights":
        body["model_id"], body["seq_id"] = of.names["model_id"], 1
    if path == PREFIX + "/create_sampling_session":
        body["model_path"] = of.names["path"]
    return {
        "method": method,
        "url": url,
        **({"json": body} if method in ("POST", "PUT") else {"params": body}),
    }


async def test_no_route_lets_in_who_has_no_valid_key(gateway: KeyedGateway):
    owner, revoked = gateway.new_key(), gateway.new_key()
    of = await make_belongings(gateway.client(owner))
    token = (await gateway.client(revoked).post(PREFIX + "/auth/token", json={})).json()["jwt"]
    assert (await gateway.client(token).get(PREFIX + "/sessions")).status_code == 200
    revoke_key(gateway.database, 2)
    await asyncio.sleep(keys._REVOKED_WITHIN + 0.1)
    let_in: list[object] = []
    for route in routes(gateway):
        if route in PUBLIC:
            continue
        request = request_to(route, of)
        for key in (None, "tml-wrong", revoked, token, gateway.signer.key_token("t-open"), owner + "x"):
            response = await gateway.client(key).request(**request)
            if response.status_code != 401 or set(response.json()) != {"error", "category"}:
                let_in.append((route, response.status_code, response.text[:200]))
    assert let_in == []
    with_key = await gateway.client(owner).get(PREFIX + "/sessions")
    assert of.names["session_id"] in with_key.text, "and the owner still finds all"


async def test_no_route_shows_a_tenant_what_is_anothers(gateway: KeyedGateway):
    owner = gateway.new_key()
    of = await make_belongings(gateway.client(owner))
    wrong: list[object] = []
    for route in routes(gateway):
        if route in PUBLIC:
            continue
        response = await gateway.client(gateway.new_key()).request(**request_to(route, of))
        if route == ("POST", PREFIX + operations.PATH):
            [reply] = operations.decode_reply(response.content)
            assert reply.status == 404
        elif route in OWN:
            if any(of.names[name] in response.text for name in ("session_id", "run_id", "path")):
                wrong.append((route, response.text[:300]))
        elif response.status_code != 404:
            wrong.append((route, response.status_code, response.text[:300]))
    assert wrong == []
    listed = await gateway.client(owner).get(PREFIX + "/checkpoints")
    assert [c["tinker_path"] for c in listed.json()["checkpoints"]] == [of.names["path"]]


async def test_the_lists_of_routes_name_only_those_that_there_are(gateway: KeyedGateway):
    there = set(routes(gateway))
    assert set(PUBLIC) <= there and there >= OWN
    for route in PUBLIC:
        if "{token}" not in route[1]:
            response = await gateway.client(None).request(*route, json={})
            assert response.status_code == 200, route


async def test_keys_of_one_tenant_see_the_same(gateway: KeyedGateway):
    of = await make_belongings(gateway.client(gateway.new_key("lab")))
    response = await gateway.client(gateway.new_key("lab")).get(PREFIX + "/sessions")
    assert response.json()["sessions"] == [of.names["session_id"]]


async def test_a_key_tells_of_itself_and_revokes_itself(gateway: KeyedGateway):
    row, key = create_key(gateway.database, "lab", "admin", "anna's")
    http, me = gateway.client(key), PREFIX + "/auth/apikey/me"
    told = (await http.get(me)).json()
    assert (told["key_id"], told["name"], told["note"]) == (row.id, "anna's", "role admin")
    assert told["details"]["user_details"]["email"] == "lab"
    assert (await http.delete(me)).status_code == 200
    assert (await http.get(me)).status_code == 401


async def test_an_admin_sees_what_all_used_and_did_and_nothing_else_of_theirs(gateway: KeyedGateway):
    hour = int(time.time()) // 3600 * 3600
    span = {"starting_on": _iso(hour), "ending_before": _iso(hour + 7200)}
    async with gateway.client(gateway.new_key("owner")) as owner:
        own = await make_belongings(owner)
        asked = {
            "/billing/usage/events": span,
            "/billing/usage/checkpoints/current": {},
            "/audit": {"day": _iso(time.time())[:10]},
        }
        seen = [(await owner.get(PREFIX + path, params=params)).json() for path, params in asked.items()]
    for role, sees in (("admin", True), ("user", False)):
        async with gateway.client(gateway.new_key("other", role)) as other:  # pyright: ignore[reportArgumentType]
            usage, storage, audit = [
                (await other.get(PREFIX + path, params=params)).json() for path, params in asked.items()
            ]
            assert (usage["data"] == seen[0]["data"]) == sees and bool(usage["data"]) == sees
            assert [(item["org_user_urn"], item["checkpoint_count"]) for item in storage["data"]] == (
                [("owner", 1)] if sees else []
            )
            entries = [(entry["event"], entry["event_details"].get("tenant")) for entry in audit["entries"]]
            assert (("checkpoint_create", "owner") in entries) == sees
            for path in (f"/training_runs/{own.names['run_id']}", f"/sessions/{own.names['session_id']}"):
                assert (await other.get(PREFIX + path)).status_code == 404
            assert (await other.get(f"{PREFIX}/checkpoints")).json()["checkpoints"] == []


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()


async def test_a_key_that_was_made_a_moment_ago_is_let_in(gateway: KeyedGateway):
    assert (await gateway.client(gateway.new_key()).get(PREFIX + "/sessions")).status_code == 200
    assert (await gateway.client("tml-wrong").get(PREFIX + "/sessions")).status_code == 401
    later = gateway.new_key()
    assert (await gateway.client(later).get(PREFIX + "/sessions")).status_code == 200


async def test_wrong_keys_cost_few_queries_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    queries: list[bool] = []
    read = database.keys
    monkeypatch.setattr(database, "keys", lambda valid_only: queries.append(True) or read(valid_only))
    ring = KeyRing(database)
    tried = await asyncio.gather(*(ring.of_key(f"tml-{n}") for n in range(1000)), return_exceptions=True)
    assert all(isinstance(result, keys.Unauthorized) for result in tried)
    assert len(queries) <= 5 and not ring._by_digest


@pytest.mark.parametrize("given", ["key", "token"])
async def test_an_owners_key_opens_a_checkpoint_for_a_friend_until_it_is_revoked(
    gateway: KeyedGateway, given: str
):
    row, owner = create_key(gateway.database)
    of = await make_belongings(gateway.client(owner))
    friend = gateway.client(gateway.new_key())
    if given == "token":
        owner = (await gateway.client(owner).post(PREFIX + "/auth/token")).json()["jwt"]
    session = (await friend.post(PREFIX + "/create_session", json={})).json()["session_id"]

    async def copy(token: str, number: int) -> int:
        body = {"source_path": of.names["path"], "session_id": session, "model_seq_id": number}
        body["weights_access_token"] = token
        return (await friend.post(PREFIX + "/copy_weights", json=body)).status_code

    assert await copy("tml-wrong", 0) == 404
    assert await copy(owner, 1) == 200
    revoke_key(gateway.database, row.id)
    await asyncio.sleep(keys._REVOKED_WITHIN + 0.1)
    assert await copy(owner, 2) == 404


async def test_a_download_needs_no_key_and_is_bound_to_its_file(gateway: KeyedGateway):
    of = await make_belongings(gateway.client(gateway.new_key()))
    stranger = gateway.client(None)
    assert (await stranger.get(of.download)).status_code == 200
    head, token, name = re.fullmatch(r"(.*/download/)([^/]+)/(.*)", of.download).groups()  # pyright: ignore
    header, claims, signature = token.split(".")
    flipped = signature[:10] + ("A" if signature[10] != "A" else "B") + signature[11:]
    for tampered in (
        f"{header}.{claims}.{flipped}",
        f"{header}.{claims[:-4]}AAAA.{signature}",
        f"{header}.{claims}.",
        gateway.signer.key_token("t-1"),
    ):
        assert (await stranger.get(head + tampered + "/" + name)).status_code == 404
    # The name at the end is for whoever saves the file: the token alone says which one it is.
    assert (await stranger.get(head + token + "/manifest.json")).content == (
        await stranger.get(of.download)
    ).content


async def test_every_response_has_the_headers_and_none_for_other_origins(
    gateway: KeyedGateway, monkeypatch: pytest.MonkeyPatch
):
    server = await HttpServer.start(gateway.app, "127.0.0.1", 0)
    port = server._server.servers[0].sockets[0].getsockname()[1]
    key = {"X-API-Key": gateway.new_key()}
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=key) as http:
            await _check_headers(gateway, http, monkeypatch)
    finally:
        await server.close()


async def _check_headers(gateway: KeyedGateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch):
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for method, path, status in (
        ("GET", "/healthz", 200),
        ("GET", "/sessions", 200),
        ("GET", "/sessions/none", 404),
        ("POST", "/no_such_thing", 404),
        ("OPTIONS", "/create_session", 405),
        ("POST", "/get_info", 500),
    ):
        if status == 500:
            monkeypatch.setattr(gateway.service, "ask", _fail)
        response = await http.request(method, PREFIX + path, json={"model_id": "x"}, headers=origin)
        assert response.status_code == status, response.text
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert "strict-transport-security" not in response.headers


async def _fail(*_: object) -> Any:
    raise RuntimeError("a fault")


async def test_no_secret_is_logged(
    gateway: KeyedGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.DEBUG)
    key = gateway.new_key()
    server = await HttpServer.start(gateway.app, "127.0.0.1", 0)
    port = server._server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": key}) as http:
        of = await make_belongings(http)
        token = (await http.post(PREFIX + "/auth/token")).json()["jwt"]
        response = await http.get(PREFIX + "/sessions", headers={"X-API-Key": token})
        assert response.status_code == 200 and "server" not in response.headers
        await http.get(PREFIX + "/sessions", headers={"X-API-Key": "tml-a-wrong-one"})
        await http.get(of.download)
        monkeypatch.setattr(gateway.service, "download_sizes", _fail)
        monkeypatch.setattr(gateway.service, "ask", _fail)
        assert (await http.get(of.download)).status_code == 500
        assert (await http.get(PREFIX + "/sessions")).status_code == 500
    await server.close()
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    said = "\n".join(logging.Formatter().format(record) for record in ours)
    assert "failed, error id" in said
    download_token = of.download.split("/download/")[1].split("/")[0]
    for secret in (key, token, "tml-a-wrong-one", download_token):
        assert secret not in said
