"""Hostile requests: never a 5xx, never a hang, never an effect on another's run, never memory without bounds.

One service on the fake backend stands for the whole module. Tenant alice has a run that was trained a little; the
others send whatever can be sent, and after each test her run must be what it was, bit by bit, and must go on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast, get_args
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import requests
import schemathesis
import zstandard
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fake_service import MODEL, make_config, make_service
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.endpoints import OPERATIONS, PREFIX, PROTOBUF, QUERIES
from twinkle.protocol.errors import Category, TooLarge
from twinkle.protocol.types import Datum, ModelInput, SparseTensor
from twinkle.server.app import build_service
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import LimitsSection
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.gateway import openapi
from twinkle.server.gateway import operations as gateway_operations
from twinkle.server.gateway.app import create_app
from twinkle.server.gateway.http import Bodies, ByteBudget, Share
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.service import sampling
from twinkle.server.tokens import Signer

T = TypeVar("T")

MAX_BYTES = 2**20
# Far more than anything here takes: what reaches it hangs.
PATIENCE = 60.0

ALICE, BOB = "alice", "bob"


class Host:
    """A service and its gateway on an event loop of their own, spoken to in plain function calls."""

    def __init__(self, portal: BlockingPortal, directory: Path) -> None:
        self._portal = portal
        self._directory = directory
        self.others: dict[str, Tenant] = {}
        signer = Signer("a secret that is long enough for its hash")
        worker = LocalWorker(FakeBackend(ModelConfig(directory)), FakeEngine())
        self.service = build_service(make_config(directory), worker, signer=signer)
        self.app = create_app(self.service, LimitsSection(max_request_bytes=MAX_BYTES), signer)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        async def in_time() -> T:
            return await asyncio.wait_for(function(*args), PATIENCE)

        return self._portal.call(in_time)

    def request(self, method: str, path: str, key: str = BOB, **more: Any) -> httpx.Response:
        """One request, whose answer must be in the one form."""
        headers = {**more.pop("headers", {}), "X-API-Key": key}

        async def send() -> httpx.Response:
            return await self._http.request(method, path, headers=headers, **more)

        try:
            response = self.run(send)
        except (TimeoutError, NotInTime):
            raise AssertionError(f"{method} {path} hangs") from None
        check_answer(response)
        return response

    def is_whole(self, run: str) -> bool:
        """Whether a run is alive and its checkpoint is there."""
        saved = self._directory / "checkpoints" / run / "weights" / "saved"
        return run in self.service.parts.live and saved.is_dir()

    def post(self, path: str, body: Any, key: str = BOB, **more: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", PREFIX + path, key, content=content, **more)

    def outcome(self, promise: httpx.Response, key: str = BOB) -> httpx.Response:
        """The result of what was accepted; a failure must be in the one form too."""
        assert promise.status_code == 200, promise.text
        for _ in range(100):
            response = self.post("/retrieve_future", {"request_id": promise.json()["request_id"]}, key)
            if response.status_code != 408:
                return response
        raise AssertionError("accepted, and never done")


def check_answer(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code == 408:
        assert response.json()["type"] == "try_again"
    elif response.status_code >= 400:
        reply = response.json()
        assert set(reply) == {"error", "category"}
        assert reply["error"] and reply["category"] in get_args(Category)
        assert len(response.content) < 20_000, "an answer must not echo what was sent"


class Tenant:
    """A tenant with something of everything."""

    def __init__(self, host: Host, key: str) -> None:
        self.host, self.key = host, key
        self.session: str = self._post("/create_session", {}).json()["session_id"]
        body: dict[str, Any] = {"session_id": self.session, "model_seq_id": 0, "base_model": MODEL}
        body["lora_config"] = {"rank": 2, "seed": 0}
        self.run: str = self.do("/create_model", body).json()["model_id"]
        self.seq_id = 0
        self.do("/forward_backward", a_pass(self.run, self.next_id()).SerializeToString())
        self.do("/optim_step", {"model_id": self.run, "seq_id": self.next_id()})
        self.do("/forward_backward", a_pass(self.run, self.next_id()).SerializeToString())
        save = {"model_id": self.run, "seq_id": self.next_id(), "path": "saved"}
        self.path: str = self.do("/save_weights", save).json()["path"]
        sampling = {"session_id": self.session, "sampling_session_seq_id": 0, "model_path": self.path}
        self.sampler: str = self._post("/create_sampling_session", sampling).json()["sampling_session_id"]

    def _post(self, path: str, body: Any) -> httpx.Response:
        return self.host.post(path, body, self.key)

    def do(self, path: str, body: Any) -> httpx.Response:
        return self.host.outcome(self._post(path, body), self.key)

    def next_id(self) -> int:
        self.seq_id += 1
        return self.seq_id

    def forward(self) -> bytes:
        """Log-probabilities of a pass that changes nothing."""
        request = a_pass(self.run, self.next_id())
        request.forward_only = True
        output = codec.decode_forward_backward_output(
            self.do("/forward_backward", request.SerializeToString()).content
        )
        return output.loss_fn_outputs[0]["logprobs"].array.tobytes()

    def state(self) -> dict[str, bytes]:
        """Weights and moments, exactly; the gradient that is pending shows in the next step."""
        worker = self.host.service.parts.worker
        state = self.host.run(worker.export_adapter, self.run, True)
        assert state.optimizer is not None
        parts = {"w": state.weights, "m": state.optimizer.exp_avg, "v": state.optimizer.exp_avg_sq}
        return {f"{part} {name}": array.tobytes() for part, of in parts.items() for name, array in of.items()}

    def checkpoints(self) -> list[dict[str, Any]]:
        listed = self.host.request("GET", f"{PREFIX}/training_runs/{self.run}/checkpoints", self.key)
        return listed.json()["checkpoints"]

    def ids(self) -> dict[str, str]:
        """What requests may name, by the names of their fields."""
        return {
            "session_id": self.session,
            "model_id": self.run,
            "run_id": self.run,
            "sampling_session_id": self.sampler,
            "sampler_id": self.sampler,
            "path": self.path,
            "model_path": self.path,
            "tinker_path": self.path,
            "source_path": self.path,
            "base_model": MODEL,
            "kind": "weights",
            "name": "saved",
        }


def a_pass(run: str, seq_id: int) -> pb.ForwardBackwardRequest:
    inputs = {"target_tokens": [2, 3, 4], "weights": [1.0, 0.5, 1.0]}
    datum = Datum(ModelInput.from_ints([1, 2, 3]), inputs)
    request = m.ForwardBackwardRequest(run, seq_id, [datum, datum], "cross_entropy")
    return pb.ForwardBackwardRequest.FromString(codec.encode_forward_backward(request))


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as directory,
        start_blocking_portal() as portal,
    ):
        # Who asks for what never comes is told so soon.
        patch.setattr(gateway_operations, "LONG_POLL_SECONDS", 0.5)
        patch.setattr(sampling, "LONG_POLL_SECONDS", 0.05)
        host = Host(portal, Path(directory))
        portal.call(host.service.start)
        yield host
        portal.call(host.service.close)


@pytest.fixture(scope="module")
def alice(host: Host) -> Iterator[Tenant]:
    """Whose run nobody must touch. At the end her pending gradient is stepped on, and nobody has added to it."""
    alice, unnamed = Tenant(host, ALICE), Tenant(host, "did the same, and is never named in a request")
    yield alice
    for tenant in (alice, unnamed):
        tenant.do("/optim_step", {"model_id": tenant.run, "seq_id": tenant.next_id()})
    assert alice.state() == unnamed.state()


@pytest.fixture
def unharmed(alice: Tenant) -> Iterator[Tenant]:
    """Alice, who is found as she was."""
    before = (alice.state(), alice.forward(), alice.checkpoints())
    yield alice
    assert (alice.state(), alice.forward(), alice.checkpoints()) == before


# ---------------------------------------------------------------- every operation of the document

SCHEMA = schemathesis.openapi.from_dict(
    openapi.document(),
    config=schemathesis.Config.from_dict({"generation": {"mode": "all", "with-security-parameters": False}}),
).exclude(path=PREFIX + "/forward_backward")  # bytes of its own: see below
ENDPOINTS: list[Any] = [cast("Any", result).ok() for result in SCHEMA.get_all_operations()]
FUZZ = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


@schemathesis.serializer(PROTOBUF)
def _as_it_is(_context: schemathesis.SerializationContext, value: Any) -> bytes:
    """Bytes that mean something are the business of other tests here."""
    return value if isinstance(value, bytes) else str(value).encode()


# Not by `SCHEMA.parametrize`: its tests share one id, and where several processes run tests, one of them would be run.
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.label)
@FUZZ
@given(data=st.data())
def test_whatever_is_sent_is_answered(endpoint: Any, host: Host, unharmed: Tenant, data: st.DataObject):
    """Half of the requests name things that are there: bob his own and alice's, alice another run of hers."""
    case: schemathesis.Case = data.draw(endpoint.as_strategy())
    chosen = zlib.crc32(repr(case).encode())
    if chosen % 2:
        name_real_things(case, victim(host, unharmed, chosen // 2 % 3))
    key = ALICE if chosen // 2 % 3 == 2 else BOB
    prepared = requests.Request(**sendable(case.as_transport_kwargs(base_url="http://test"))).prepare()
    headers = {name: value for name, value in prepared.headers.items() if name.lower() != "x-api-key"}
    headers.pop("Content-Length", None)
    assert prepared.method is not None and prepared.url is not None
    response = host.request(prepared.method, prepared.url, key, headers=headers, content=prepared.body)
    if response.status_code == 200 and "request_id" in (reply := json_of(response)):
        poll = host.post("/retrieve_future", {"request_id": reply["request_id"]}, key)
        assert poll.status_code == 200 or is_waiting_for_an_earlier_one(poll)


def victim(host: Host, alice: Tenant, which: int) -> dict[str, str]:
    """What bob may name (alice's and his own), and what alice may (another run of hers)."""
    if which == 0:
        return alice.ids()
    key = (BOB, ALICE)[which - 1]
    tenant = host.others.get(key)
    if tenant is None or not host.is_whole(tenant.run):
        tenant = host.others[key] = Tenant(host, key)
    return tenant.ids()


def name_real_things(case: schemathesis.Case, ids: dict[str, str]) -> None:
    for holder in (case.path_parameters, case.body, case.query):
        if isinstance(holder, dict):
            for name in holder.keys() & ids.keys():
                holder[name] = ids[name]


def sendable(arguments: dict[str, Any]) -> dict[str, Any]:
    known = ("method", "url", "headers", "params", "data", "json", "cookies", "files")
    return {name: value for name, value in arguments.items() if name in known}


def json_of(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_waiting_for_an_earlier_one(poll: httpx.Response) -> bool:
    """A request whose `seq_id` is ahead of its run's."""
    return poll.status_code == 408


# ---------------------------------------------------------------- training passes

EXTREMES = [0, 1, -1, 2, 3, 7, 2**25, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)]
NAMES = ["target_tokens", "weights", "logprobs", "advantages", "x" * 300]
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "custom", "", "x" * 500_000]

int64s = st.lists(st.one_of(st.integers(0, 4), st.sampled_from(EXTREMES)), max_size=6)
floats = st.lists(st.floats(width=32), max_size=6)
shapes = st.one_of(
    st.sampled_from(
        [[3], [3, 1], [3, 2], [2, 2], [], [1] * 70, [2**62] * 1000, [0, 2**40], [1, 2**25], [2**25]]
    ),
    int64s,
)


def pack_int64(values: Iterable[int]) -> bytes:
    return np.array(list(values), "<i8").tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> pb.Tensor:
    dtype = draw(st.sampled_from([0, 1, 2, 3, 4, 99]))
    raw = draw(
        st.one_of(
            st.binary(max_size=32),
            int64s.map(pack_int64),
            floats.map(lambda values: np.array(values, "<f4").tobytes()),
        )
    )
    tensor = pb.Tensor(dtype=dtype, shape=draw(shapes))  # pyright: ignore[reportArgumentType]
    if draw(st.booleans()):
        tensor.dense = raw
    else:
        rows, cols = draw(int64s.map(pack_int64)), draw(int64s.map(pack_int64))
        tensor.sparse_csr.CopyFrom(pb.SparseCsr(values=raw, crow_indices=rows, col_indices=cols))
    return tensor


Change: TypeAlias = Callable[[pb.ForwardBackwardRequest], None]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Something wrong with a field."""
    kind = draw(st.sampled_from(["tensor", "tensor", "tokens", "loss", "config", "seq", "datum", "kind"]))
    name, tensor = draw(st.sampled_from(NAMES)), draw(tensors())
    tokens = draw(st.one_of(st.binary(max_size=9), int64s.map(pack_int64)))
    loss, number, text = draw(st.sampled_from(LOSSES)), draw(st.floats()), draw(st.text(max_size=5))
    parameter = draw(st.sampled_from(["clip_low_threshold", "beta", "loss_id", "\0"]))
    seq_id = draw(st.sampled_from([-(2**31), -1, 0, 10**6, 2**31 - 1]))

    def change(request: pb.ForwardBackwardRequest) -> None:
        datum = request.data[0]
        match kind:
            case "tensor":
                datum.loss_fn_inputs[name].CopyFrom(tensor)
            case "tokens":
                datum.model_input.add().encoded_text.tokens = tokens
            case "loss":
                request.loss_fn = loss
            case "config":
                request.loss_fn_config[parameter] = number
                request.loss_fn_config_v2[parameter].text = text
            case "seq":
                request.seq_id = seq_id
            case "datum":
                request.data.extend([datum] * 50)
            case _:
                datum.model_input.add().image.data = b"image"

    return change


Damage: TypeAlias = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """A bit turned over, an end cut off, a part sent twice, or something put where it does not belong."""
    kind = draw(st.sampled_from(["none", "none", "none", "flip", "cut", "repeat", "insert", "append"]))
    first, last = sorted(draw(st.tuples(st.integers(0, 999), st.integers(0, 999))))
    bit, inserted = draw(st.integers(0, 7)), draw(st.binary(max_size=40))

    def damage(body: bytes) -> bytes:
        at, end = first * len(body) // 1000, last * len(body) // 1000
        match kind:
            case "flip":
                return body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :]
            case "cut":
                return body[:at]
            case "repeat":
                return body[:end] + body[at:]
            case "insert":
                return body[:at] + inserted + body[at:]
            case "append":
                return body + body[at:end]
            case _:
                return body

    return damage


@given(wrong=st.lists(changes(), max_size=3), damage=damages(), whose=st.sampled_from("bbbbbbaax"))
@settings(FUZZ, max_examples=200)
def test_whatever_pass_is_sent_is_refused_or_comes_to_an_end(
    wrong: list[Change], damage: Damage, whose: str, host: Host, unharmed: Tenant
):
    victim(host, unharmed, 1)
    bob = host.others[BOB]
    request = a_pass({"a": unharmed.run, "b": bob.run}.get(whose, "x" * 1000), bob.seq_id + 1)
    for change in wrong:
        change(request)
    response = host.post(
        "/forward_backward", damage(request.SerializeToString()), headers={"Content-Type": PROTOBUF}
    )
    if response.status_code == 200:
        poll = host.post("/retrieve_future", {"request_id": response.json()["request_id"]})
        assert poll.status_code in (200, 408)
    # Refused or done, its place in the order is taken; where its number could not be read this pass takes it.
    bob.seq_id += 1
    last = a_pass(bob.run, bob.seq_id)
    host.post("/forward_backward", last.SerializeToString())


def test_the_queue_of_who_sent_all_that_still_works(host: Host, unharmed: Tenant):
    bob = Tenant(host, "bob's brother")
    for body in (b"", b"\xff" * 100, a_pass(bob.run, bob.seq_id + 1).SerializeToString()[:-1]):
        host.post("/forward_backward", body, bob.key)
    assert len(bob.forward()) == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", pb.Tensor(dense=b"\0" * 5, dtype=pb.DTYPE_FLOAT32, shape=[3])),
        ("weights", pb.Tensor(dense=b"\0" * 4, dtype=pb.DTYPE_FLOAT32, shape=[1] * 70)),
        ("weights", pb.Tensor(dense=b"\0" * 4, dtype=pb.DTYPE_FLOAT32, shape=[2**62] * 100_000)),
        ("weights", pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**62] * 1000, sparse_csr=pb.SparseCsr())),
        ("weights", pb.Tensor(dense=b"\0" * 4, dtype=pb.DTYPE_FLOAT32, shape=[-1])),
        ("target_tokens", pb.Tensor(dense=b"\0" * 24, dtype=99, shape=[3])),  # pyright: ignore
    ],
)
def test_a_pass_that_cannot_be_read_is_refused_and_the_next_one_runs(
    host: Host, unharmed: Tenant, field: str, value: pb.Tensor
):
    victim(host, unharmed, 1)
    bob = Tenant(host, BOB)
    request = a_pass(bob.run, bob.next_id())
    request.data[0].loss_fn_inputs[field].CopyFrom(value)
    response = host.post("/forward_backward", request.SerializeToString())
    assert response.status_code == 400
    assert f"data[0].loss_fn_inputs.{field}" in response.json()["error"]
    assert len(bob.forward()) == 12


def test_a_json_request_that_cannot_be_read_is_refused_and_the_next_one_runs(host: Host):
    bob = Tenant(host, BOB)
    wrong = {"model_id": bob.run, "seq_id": bob.next_id(), "adam_params": {"learning_rate": -1}}
    assert host.post("/optim_step", wrong).status_code == 400
    assert len(bob.forward()) == 12


def test_another_tenants_order_is_not_moved_by_what_cannot_be_read(host: Host, unharmed: Tenant):
    request = a_pass(unharmed.run, unharmed.seq_id + 1)
    request.data[0].loss_fn_inputs["weights"].shape.append(-1)
    assert host.post("/forward_backward", request.SerializeToString()).status_code == 400
    wrong = {"model_id": unharmed.run, "seq_id": unharmed.seq_id + 1, "adam_params": {"learning_rate": -1}}
    assert host.post("/optim_step", wrong).status_code == 400


def test_row_pointers_that_wrap_around_are_refused():
    """Their differences are all positive in 64 bits, and add up to the number of values."""
    rows = np.array([0, 2**62, 2**63 - 1, -(2**63), -(2**62), 0, 2], np.int64)
    assert (np.diff(rows) > 0).all() and np.diff(rows).sum() == 2
    sparse = pb.SparseCsr(
        values=pack_int64([1, 1]), crow_indices=rows.tobytes(), col_indices=pack_int64([0, 0])
    )
    request = a_pass("run", 1)
    request.data[0].loss_fn_inputs["weights"].CopyFrom(
        pb.Tensor(sparse_csr=sparse, dtype=pb.DTYPE_INT64, shape=[6, 1])
    )
    with pytest.raises(codec.InvalidRequest, match="must rise from 0"):
        codec.decode_forward_backward(request.SerializeToString())
    with pytest.raises(codec.InvalidRequest, match="must rise from 0"):
        SparseTensor(np.array([1, 1]), rows, np.array([0, 0]), (6, 1)).check("tensor")


# ---------------------------------------------------------------- JSON

BIG = "x" * 500_000
BOMBS = [
    b"[" * 100_000,
    b"[" * 300 + b"]" * 300,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b"1" + b"0" * 5000,
    b"1" + b"0" * 400,
    b"-1",
    b"9223372036854775808",
    b"1e400",
    b"NaN",
    b"-Infinity",
    b'"\\ud800"',
    b'{"\\ud800": "\\udfff"}',
    b'"a\\u0000b"',
    b'"' + BIG.encode() + b'"',
    b'{"' + BIG.encode() + b'": 1}',
    b'"../../etc/passwd"',
    b'"twinkle://../../weights/x"',
    b'["' + b"a" * 100_000 + b'"' + b', ""' * 20_000 + b"]",
    b"[" + b"1," * 100_000 + b"1]",
    b"[" + b'"",' * 100_000 + b'""]',
    b"null",
    b"{}",
    b'"\xff"',
    b"",
]
BODIES = [
    (path, method, request)
    for path, method, request in [
        *((endpoint.path, "POST", endpoint.request) for endpoint in OPERATIONS),
        *((query.path, query.method, query) for query in QUERIES),
        ("/retrieve_future", "POST", m.RetrieveFutureRequest),
    ]
    if method in ("POST", "PUT") and request is not m.ForwardBackwardRequest
]


@pytest.mark.parametrize(("path", "method", "request_type"), BODIES)
def test_json_bombs_in_any_field_are_answered(
    host: Host, unharmed: Tenant, path: str, method: str, request_type: type[m.Value]
):
    victim(host, unharmed, 1)
    ids = host.others[BOB].ids()
    url = PREFIX + path.format_map(ids)
    plain = {
        name: json.dumps(ids.get(name, 0)).encode()
        for name, field in request_type.model_fields.items()
        if field.is_required() and "{" + name + "}" not in path
    }
    for bomb in BOMBS:
        host.request(method, url, content=bomb)
        host.request(method, url, content=json_object(dict.fromkeys(request_type.model_fields, bomb)))
    for i, name in enumerate(request_type.model_fields):
        for bomb in BOMBS[i % 2 :: 2]:
            host.request(method, url, content=json_object({**plain, name: bomb}))


def json_object(fields: dict[str, bytes]) -> bytes:
    return b"{" + b", ".join(json.dumps(name).encode() + b": " + fields[name] for name in fields) + b"}"


@pytest.mark.parametrize(
    "tokens",
    [
        b'["' + b"a" * 200_000 + b'"' + b', ""' * 50_000 + b"]",
        b"[" * 150 + b"]" * 150,
        b'[[1], "a"]',
        b"[null]",
    ],
)
def test_texts_and_lists_among_tokens_take_no_more_room_than_they_have(host: Host, tokens: bytes):
    """As an array of texts of one length the first would be 40 GB."""
    body = (
        b'{"sampling_session_id": "s", "seq_id": 0, "prompt": {"chunks": [{"type": "encoded_text", "tokens": '
    )
    response = host.post("/asample", body + tokens + b"}]}}")
    assert response.status_code == 400 and "flat list of integers" in response.json()["error"]


def test_a_list_of_wrong_values_is_one_mistake(host: Host):
    body = json.dumps({"tags": [1] * 60_000, "user_metadata": {}}).encode()
    with little_memory(10 * len(body)):
        response = host.post("/create_session", body)
    assert response.json()["error"].startswith("tags.0: Input should be a valid string")
    many = json.dumps({"user_metadata": {f"{'x' * 500} {i}": i for i in range(1000)}}).encode()
    error = host.post("/sessions/search", many).json()["error"]
    assert error.endswith("; and 992 more")


@pytest.mark.parametrize("ttl", [10**15, 10**400, 2**63, 0, -1])
def test_a_time_to_live_beyond_all_dates_is_refused(host: Host, ttl: int):
    bob = Tenant(host, BOB)
    place = f"{PREFIX}/training_runs/{bob.run}/checkpoints/weights/saved"
    assert host.request("PUT", place + "/ttl", json={"ttl_seconds": ttl}).status_code == 400
    save = {"model_id": bob.run, "seq_id": bob.next_id(), "path": "again", "ttl_seconds": ttl}
    assert host.post("/save_weights", save).status_code == 400
    copy = {"source_path": bob.path, "session_id": bob.session, "model_seq_id": 7, "ttl_seconds": ttl}
    assert host.post("/copy_weights", copy).status_code == 400
    assert [checkpoint["checkpoint_id"] for checkpoint in bob.checkpoints()] == ["weights/saved"]


@pytest.mark.parametrize("path", ["/copy_weights", "/create_model", "/create_sampling_session"])
@pytest.mark.parametrize("number", [10**300, 2**63, -1])
def test_numbers_that_make_no_id_are_refused(host: Host, path: str, number: int):
    """They would become part of a file's name, and of a database's key."""
    bob = host.others.get(BOB) or Tenant(host, BOB)
    body: dict[str, Any] = {**bob.ids(), "model_seq_id": number, "sampling_session_seq_id": number}
    assert host.post(path, body).status_code == 400


def test_metadata_comes_back_as_it_was_sent_or_is_refused(host: Host):
    odd = {"": "\0", "ä\U0001f600": [1, {"a": None}], "n": 10**400}
    session = host.post("/create_session", {"user_metadata": odd}).json()["session_id"]
    shown = host.request("GET", f"{PREFIX}/sessions/{session}").json()["user_metadata"]
    assert shown == {"": "\0", "ä\U0001f600": '[1, {"a": null}]', "n": str(10**400)}
    for wrong in (b'{"a": "\\ud800"}', b'{"a": NaN}', b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"):
        assert host.post("/create_session", b'{"user_metadata": ' + wrong + b"}").status_code == 400


def test_a_sample_may_not_ask_for_what_fails_the_samples_of_others(host: Host):
    """All sequences of a batch are drawn together: one number that no tensor holds would end them all."""
    bob = Tenant(host, BOB)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    sample = {"sampling_session_id": bob.sampler, "seq_id": 0, "prompt": prompt}
    refused = host.post("/asample", {**sample, "sampling_params": {"top_k": 2**63}})
    assert refused.status_code == 400 and "top_k" in refused.json()["error"]
    large = {**sample, "num_samples": 1000, "topk_sample_logprobs": 1000}
    refused = host.post("/asample", large)
    assert refused.status_code == 400 and "topk_sample_logprobs" in refused.json()["error"]
    shape = {"data": [1], "dtype": "int64", "shape": [10**4000] * 200}
    assert host.post("/asample", {**sample, "target_prompt_logprobs": shape}).status_code == 400
    shape = {"data": [1], "dtype": "int64", "shape": [1] * 70}
    assert host.post("/asample", {**sample, "target_prompt_logprobs": shape}).status_code == 400


async def test_asking_for_clients_that_are_not_there_leaves_nothing_behind():
    log = CompletionLog()
    for number in range(100):
        assert (await log.after(("sampler", number), 5, timeout=0.0)).cursor == 0
        assert not (await log.after(("sampler", number), 0, timeout=0.001)).completions
    assert not log._logs


# ---------------------------------------------------------------- paths, queries, headers

WORDS = [
    "..",
    "../..",
    "%2e%2e%2f",
    "a%2Fb",
    "a%00b",
    "%ff%fe",
    "%ED%A0%80",
    "x" * 4000,
    "'; drop table runs; --",
    "%",
]


@pytest.mark.parametrize(("method", "path"), sorted((query.method, query.path) for query in QUERIES))
def test_odd_paths_and_queries_are_answered(host: Host, unharmed: Tenant, method: str, path: str):
    for word in WORDS:
        raw = word if "%" in word else quote(word, safe="")
        names = {name: raw for name in ("session_id", "run_id", "kind", "name", "sampler_id")}
        host.request(method, PREFIX + path.format_map(names))
        names = {**unharmed.ids(), "name": raw}
        host.request(method, PREFIX + path.format_map(names))
        fields = [
            f"{name}={raw}&{name}={raw}x" for name in ("limit", "offset", "day", "project_id", "run_id")
        ]
        query = "&".join([*fields, f"starting_on={raw}", f"ending_before={raw}", f"base_model={raw}"])
        host.request(method, f"{PREFIX}{path.format_map(names)}?{query}")


@pytest.mark.parametrize(
    "query",
    [
        "sessions?offset=99999999999999999999",
        "training_runs?offset=9223372036854775807&limit=1000",
        "checkpoints?offset=-1",
        "sessions?limit=1&limit=1e9",
        "audit?day=9999-12-31",
        "audit?day=0001-01-01",
        "billing/usage/events?starting_on=0001-01-01T00:00:00%2B14:00&ending_before=0001-01-02T00:00:00%2B14:00",
        "billing/usage/events?starting_on=9999-12-31T23:00:00-14:00&ending_before=9999-12-31T23:00:00-15:00",
    ],
)
def test_numbers_and_dates_at_the_ends_of_their_ranges_are_answered(host: Host, query: str):
    host.request("GET", f"{PREFIX}/{query}")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "eyJ" + "W" * 8000 + ".e30.x"},
        {"X-API-Key": b"\xff\xfe"},
        {"Authorization": "Bearer " + "x" * 50_000},
        {"Authorization": "Basic eyJ"},
        {"Host": "[::1"},
        {"Host": "a b/.."},
        {"X-Idempotency-Key": "x" * 10_000},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "zstd, zstd"},
        {"Content-Type": "text/html; charset=utf-7"},
        {"Content-Length": "-5"},
    ],
)
async def test_odd_headers_are_answered(host: Host, headers: dict[str, Any]):
    transport = httpx.ASGITransport(host.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test" + PREFIX) as http:
        for path in ("/auth/token", "/client/config", "/no_such_thing", "/forward_backward"):
            check_answer(await http.post(path, headers=headers, content=b"{}"))


def test_a_download_of_what_was_deleted_is_not_there(host: Host):
    bob = Tenant(host, BOB)
    place = f"{PREFIX}/training_runs/{bob.run}/checkpoints/weights/saved"
    urls = host.request("GET", place + "/external_weights_urls").json()["urls"]
    archive = host.request("GET", place + "/archive").headers["location"]
    assert host.request("GET", archive).status_code == 200
    assert host.request("DELETE", place).status_code == 200
    for url in (*urls.values(), archive):
        assert host.request("GET", url).status_code == 404


# ---------------------------------------------------------------- bodies


@contextmanager
def little_memory(bound: int) -> Generator[None]:
    """Neither Python's objects nor the process grow by more than `bound` bytes (and what a malloc arena takes)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < bound
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < bound + 64 * 2**20


def zstd_of_zeros(blocks: int, declared: int | None = None, window_log: int = 23) -> bytes:
    """A zstd frame (RFC 8878) of `blocks` times 128 KiB of zeros, at four bytes each.

    Args:
        declared: the length that the frame's header states, true or not.
    """
    sizes = b"" if declared is None else struct.pack("<Q", declared)
    header = b"\x28\xb5\x2f\xfd" + bytes([0xC0 if sizes else 0x00, (window_log - 10) << 3]) + sizes
    run_length, size = 1, 2**17
    block = struct.pack("<I", run_length << 1 | size << 3)[:3] + b"\0"
    last = struct.pack("<I", 1 | run_length << 1 | size << 3)[:3] + b"\0"
    return header + block * (blocks - 1) + last


def test_the_bombs_are_zstd():
    assert zstandard.ZstdDecompressor().decompress(zstd_of_zeros(3), 2**20) == bytes(3 * 2**17)
    assert zstandard.ZstdDecompressor().decompress(zstd_of_zeros(2, declared=2**18)) == bytes(2**18)


@pytest.mark.parametrize(
    ("bomb", "status"),
    [
        (zstd_of_zeros(20_000), 413),  # 2.6 GB in 80 KB
        (zstd_of_zeros(20_000, declared=20_000 * 2**17), 413),
        (zstd_of_zeros(20_000, declared=100), 400),  # more than it says
        (zstd_of_zeros(1, declared=2**62), 413),
        (zstd_of_zeros(20_000)[:-2], 413),
        (zstd_of_zeros(9), 413),
        (zstd_of_zeros(1, window_log=31), 400),  # asks for 2 GB to work in
        (zstd_of_zeros(1, window_log=41), 400),
        (zstd_of_zeros(1, declared=100), 400),
        (zstd_of_zeros(1, declared=2**19), 400),
        (codec.compress(a_pass("run", 1).SerializeToString())[:-1], 400),
        (codec.compress(a_pass("run", 1).SerializeToString())[:-30], 400),
        (codec.compress(b"\x12" * 50) * 2, 400),  # of two frames, the second was once passed over
        (a_pass("run", 1).SerializeToString(), 400),
        (b"", 400),
        (b"\x28\xb5\x2f\xfd", 400),
    ],
    # Not by their bytes: the order of a protobuf map is another in each process.
    ids=itertools.count(),
)
def test_zstd_bombs_and_broken_frames_are_refused_in_little_memory(
    host: Host, unharmed: Tenant, bomb: bytes, status: int
):
    with little_memory(8 * MAX_BYTES):
        response = host.post("/forward_backward", bomb, headers={"Content-Encoding": "zstd"})
    assert response.status_code == status, response.text
    with little_memory(8 * MAX_BYTES):
        assert host.post("/create_session", bomb, headers={"Content-Encoding": "zstd"}).status_code == status


def test_zstd_of_unstated_length_is_read(host: Host):
    bob = Tenant(host, BOB)
    stream = zstandard.ZstdCompressor().compressobj()
    body = stream.compress(a_pass(bob.run, bob.next_id()).SerializeToString()) + stream.flush()
    assert zstandard.frame_content_size(body) == -1
    host.outcome(host.post("/forward_backward", body, headers={"Content-Encoding": "zstd"}))


@pytest.mark.parametrize("path", ["/forward_backward", "/asample", "/create_session", "/retrieve_future"])
def test_a_body_without_end_is_refused_at_the_limit(host: Host, unharmed: Tenant, path: str):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**16
            yield bytes(2**16)

    with little_memory(8 * MAX_BYTES):
        response = host.request("POST", PREFIX + path, content=endless())
    assert response.status_code == 413
    assert sent <= MAX_BYTES + 2**17


async def test_a_body_in_tiny_chunks_takes_no_more_than_a_few_times_the_limit():
    # Large beside what the service's own tasks, in another thread, may take meanwhile. A list of the chunks would take
    # four times as much.
    limit, sent = 2**20, 0

    async def receive() -> dict[str, Any]:
        nonlocal sent
        sent += 16
        return {"type": "http.request", "body": bytes([sent // 16 % 256] * 16), "more_body": True}

    request = Request({"type": "http", "headers": [], "method": "POST"}, receive)
    with little_memory(3 * limit), pytest.raises(TooLarge), Share(ByteBudget("", None, None), "") as share:
        await Bodies(LimitsSection(max_request_bytes=limit)).read(request, share, limit)
    assert sent == limit + 16


def test_a_request_without_tensors_may_not_be_as_large_as_one_with_them(tmp_path: Path):
    """What Python makes of JSON is many times as large."""
    body = b'{"user_metadata": {"a": [' + b"[]," * 400_000 + b"[]]}}"
    app = create_app(make_service(tmp_path), LimitsSection(max_request_bytes=100 * 2**20), Signer("secret"))

    async def post(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await http.post(PREFIX + path, content=body)

    with little_memory(10 * 2**20):
        for path in ("/create_session", "/create_model", "/save_weights", "/retrieve_future"):
            assert asyncio.run(post(path)).status_code == 413


def test_sparse_tensors_that_stand_for_gigabytes_are_refused_in_little_memory(host: Host, unharmed: Tenant):
    def request(*shapes: list[int]) -> bytes:
        message = a_pass("run", 1)
        del message.data[1:]
        for shape in shapes:
            rows = shape[0] if 0 <= shape[0] < 100 else 0
            sparse = pb.SparseCsr(crow_indices=pack_int64([0] * (rows + 1)))
            datum = message.data.add()
            datum.loss_fn_inputs["weights"].CopyFrom(
                pb.Tensor(sparse_csr=sparse, dtype=pb.DTYPE_INT64, shape=shape)
            )
        return message.SerializeToString()

    half = [1, codec.MAX_DENSE_ELEMENTS // 2 + 1]
    for body, status in (
        (request([1, 2**32]), 400),
        (request([2**32, 2**32]), 400),
        (request([2**40, 0]), 400),
        (request(half, half), 413),
        # A negative size once made room for others in the sum.
        (request(*[half] * 8, [-(2**25), 8]), 400),
    ):
        with little_memory(8 * MAX_BYTES):
            response = host.post("/forward_backward", body)
        assert response.status_code == status, response.text


@pytest.mark.parametrize("part", [b"\x1a\x00", b"\x1a\x02\x0a\x00"])
def test_empty_datums_and_chunks_by_the_hundred_thousand_are_refused_in_little_memory(
    host: Host, part: bytes
):
    """Two bytes each, and a thousand as an object."""
    body = part * (MAX_BYTES // len(part))
    assert len(pb.ForwardBackwardRequest.FromString(body).data) > codec.MAX_DATUMS
    with little_memory(30 * MAX_BYTES):
        response = host.post("/forward_backward", codec.compress(body), headers={"Content-Encoding": "zstd"})
    assert response.status_code == 413
    chunks = b"\x0a\x00" * 400_000
    datum = b"\x1a" + length_of(chunks) + chunks
    with little_memory(30 * MAX_BYTES):
        assert host.post("/forward_backward", datum).status_code == 413


def length_of(body: bytes) -> bytes:
    """As a varint."""
    size, groups = len(body), bytearray()
    while size >= 128:
        groups.append(size & 127 | 128)
        size >>= 7
    return bytes([*groups, size])
