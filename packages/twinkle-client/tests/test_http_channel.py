"""The channel against a real HTTP server on loopback that misbehaves as networks and servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, PROTOBUF
from twinkle.protocol.errors import ConnectionFailed, InvalidRequest, NotFound, RequestFailed, TwinkleError
from twinkle.protocol.operations import Reply
from twinkle.protocol.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TensorData,
)
from twinkle_client.http_channel import HttpChannel
from twinkle_client.settings import Settings

Answer = tuple[int, dict | bytes]
SAVE = m.SaveWeightsRequest(model_id="run", seq_id=1, path="mine")
ZSTD = b"\x28\xb5\x2f\xfd"
SAVED = (200, {"path": "twinkle://run/weights/mine"})
STEP = m.OptimStepRequest(model_id="run", seq_id=2)


class Script:
    """What the server does, request by request; everything it was sent."""

    def __init__(self) -> None:
        self.answers: list[Callable[[], Answer] | Answer | None] = []
        self.answer_to: Callable[[Any], Answer] | None = None  # whatever comes, in whatever order
        self.seen: list[tuple[str, dict, Any]] = []

    def paths(self) -> list[str]:
        return [path.removeprefix("/api/v1") for path, _, _ in self.seen]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def channel(script: Script) -> Iterator[HttpChannel]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            is_json = self.headers.get("content-type") != PROTOBUF
            script.seen.append(
                (self.path, dict(self.headers), json.loads(body or b"{}") if is_json else body)
            )
            answer = script.answer_to(body) if script.answer_to is not None else script.answers.pop(0)
            if answer is None:  # the connection breaks before an answer
                self.close_connection = True
                self.connection.close()
                return
            status, values = answer() if callable(answer) else answer
            encoded = values if isinstance(values, bytes) else json.dumps(values).encode()
            self.send_response(status)
            self.send_header("content-type", PROTOBUF if isinstance(values, bytes) else "application/json")
            self.send_header("content-length", str(len(encoded)))
            if status == 429:
                self.send_header("retry-after", "0.05")
            self.end_headers()
            self.wfile.write(encoded)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    channel = HttpChannel(
        Settings(f"http://127.0.0.1:{server.server_address[1]}", "the-key"), retry_seconds=5
    )
    yield channel
    channel.close()
    server.shutdown()
    server.server_close()


def test_an_operation_is_posted_once_and_polled_until_it_is_done(channel: HttpChannel, script: Script):
    script.answers = [
        (200, {"request_id": "r"}),
        (408, {"request_id": "r", "type": "try_again"}),
        (408, {"request_id": "r", "type": "try_again"}),
        SAVED,
    ]
    assert channel.submit(SAVE).result(10) == m.SaveWeightsResponse(path="twinkle://run/weights/mine")
    assert script.paths() == ["/save_weights"] + ["/retrieve_future"] * 3
    assert all(headers["X-API-Key"] == "the-key" for _, headers, _ in script.seen)


def test_a_broken_connection_a_limit_and_a_dying_proxy_are_tried_again_with_the_same_body(
    channel: HttpChannel, script: Script
):
    script.answers = [
        None,
        (429, {"error": "slow down", "category": "user"}),
        (503, {"unrelated": "Service Unavailable"}),
        (408, {"error": "body: it comes too slowly", "category": "user"}),
        (200, {"request_id": "r"}),
        None,
        SAVED,
    ]
    channel.submit(SAVE).result(20)
    assert script.paths() == ["/save_weights"] * 5 + ["/retrieve_future"] * 2
    bodies = [body for path, _, body in script.seen if path.endswith("save_weights")]
    assert bodies[0] == bodies[-1] and bodies[0]["seq_id"] == 1


def test_what_the_server_cannot_take_just_now_is_sent_again_until_it_can(
    channel: HttpChannel, script: Script
):
    full = {"error": "the disk is full", "category": "server"}
    script.answers = [(503, full), (503, full), (200, {"request_id": "r"}), SAVED]
    assert channel.submit(SAVE).result(10) == m.SaveWeightsResponse(path="twinkle://run/weights/mine")
    refused = Reply("", 503, JSON, json.dumps(full).encode())
    stepped = (200, {"metrics": {"grad_norm:mean": 2.0}})
    script.answers = [(200, operations.encode_reply([refused])), (200, {"request_id": "s"}), stepped]
    assert channel.submit(STEP).result(10) == m.OptimStepResponse(metrics={"grad_norm:mean": 2.0})


def test_what_the_server_said_is_what_is_raised(channel: HttpChannel, script: Script):
    script.answers = [(400, {"error": "rank: too high", "category": "user"})]
    with pytest.raises(InvalidRequest, match="rank: too high"):
        channel.submit(SAVE).result(10)
    script.answers = [(404, {"error": "model_id: no live run", "category": "user"})]
    with pytest.raises(NotFound):
        channel.ask(m.GetInfoRequest(model_id="x")).result(10)


def test_an_accepted_operation_that_failed_names_its_category_and_request(
    channel: HttpChannel, script: Script
):
    script.answers = [(200, {"request_id": "r"}), (200, {"error": "too large", "category": "user"})]
    with pytest.raises(RequestFailed, match="too large") as caught:
        channel.submit(SAVE).result(10)
    assert (caught.value.category, caught.value.request_id) == ("user", "r")


def test_a_fault_of_the_service_itself_is_final(channel: HttpChannel, script: Script):
    script.answers = [(500, {"error": "error id 123", "category": "server"})]
    with pytest.raises(Exception, match="error id 123"):
        channel.submit(SAVE).result(10)
    assert len(script.seen) == 1


def test_fields_go_into_path_query_and_body(channel: HttpChannel, script: Script):
    script.answers = [
        (200, {"checkpoints": []}),
        (200, {}),
        (200, {"training_runs": [], "cursor": {"offset": 5, "limit": 2, "total_count": 0}}),
    ]
    channel.ask(m.ListCheckpoints(run_id="s:train:0")).result(10)
    channel.ask(m.FinishSessionRequest(session_id="s")).result(10)
    channel.ask(m.ListTrainingRuns(limit=2, offset=5)).result(10)
    assert script.paths() == [
        "/training_runs/s:train:0/checkpoints",
        "/sessions/s/finish",
        "/training_runs?limit=2&offset=5&access_scope=owned",
    ]
    assert script.seen[1][2]["reason"] == {"type": "success"}


def test_a_server_that_is_not_there_is_said_to_be_with_the_address():
    channel = HttpChannel(Settings("http://127.0.0.1:9", None), retry_seconds=0.1)
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9 can't be reached.*TWINKLE_BASE_URL"):
        channel.ask(m.GetServerCapabilities()).result(10)
    channel.close()


def test_a_plain_server_asked_by_https_gets_a_hint(channel: HttpChannel, script: Script):
    script.answers.append((200, {}))
    address = channel._settings.base_url.replace("http://", "https://")
    other = HttpChannel(Settings(address, None), retry_seconds=0.1)
    with pytest.raises(ConnectionFailed, match="A server without certificates is reached by http://"):
        other.submit(SAVE).result(20)
    other.close()


def test_a_channel_that_is_closed_stays_closed():
    channel = HttpChannel(Settings("http://127.0.0.1:9", None))
    channel.close()
    with pytest.raises(TwinkleError, match="this ServiceClient is closed; make a new one"):
        channel.submit(SAVE)


# ---------------------------------------------------------------- operations that go together


def a_pass(seq_id: int, tokens: int = 2) -> m.ForwardBackwardRequest:
    ids = list(range(tokens))
    return m.ForwardBackwardRequest(
        "run", seq_id, [Datum(ModelInput.from_ints(ids), {"target_tokens": ids})], "cross_entropy"
    )


PASSED = ForwardBackwardOutput(
    [{"logprobs": TensorData(np.array([-1.0, -2.0], np.float32))}], {"loss:sum": 3.0}
)


def reply_of_pass(request_id: str = "p") -> Reply:
    return Reply(request_id, 200, PROTOBUF, codec.encode_forward_backward_output(PASSED))


def reply_of_step(request_id: str = "s", norm: float = 2.0) -> Reply:
    return Reply(request_id, 200, JSON, json.dumps({"metrics": {"grad_norm:mean": norm}}).encode())


def together(*replies: Reply) -> Answer:
    return 200, operations.encode_reply(replies)


def test_a_pass_and_the_step_behind_it_are_one_request(channel: HttpChannel, script: Script):
    script.answers = [together(reply_of_pass(), reply_of_step())]
    passed, stepped = channel.submit(a_pass(1)), channel.submit(STEP)
    assert stepped.result(10) == m.OptimStepResponse(metrics={"grad_norm:mean": 2.0})
    output = passed.result(10)
    assert isinstance(output, ForwardBackwardOutput)
    assert output.metrics == PASSED.metrics
    np.testing.assert_array_equal(output.loss_fn_outputs[0]["logprobs"].array, [-1.0, -2.0])
    [(path, _, body)] = script.seen
    assert path == "/api/v1/operations"
    sent = operations.decode_request(body)
    assert [posted.endpoint.path for posted in sent] == ["/forward_backward", "/optim_step"]
    assert codec.decode_forward_backward(sent[0].body).seq_id == 1
    assert codec.decode_json(m.OptimStepRequest, sent[1].body) == STEP


def test_a_pass_that_nothing_follows_is_sent_all_the_same(channel: HttpChannel, script: Script):
    script.answers = [together(reply_of_pass()), together(reply_of_step())]
    assert channel.submit(a_pass(1)).result(10)
    assert channel.submit(STEP).result(10)
    assert script.paths() == ["/operations"] * 2


def test_a_large_pass_does_not_wait_for_company(channel: HttpChannel, script: Script):
    def answer_to(body: bytes) -> Answer:
        [operation] = operations.decode_request(codec.decompress(body, 10**7) if body[:4] == ZSTD else body)
        return together(reply_of_step() if operation.endpoint.path == "/optim_step" else reply_of_pass())

    script.answer_to = answer_to
    large, step = channel.submit(a_pass(1, tokens=20_000)), channel.submit(STEP)
    assert large.result(10) and step.result(10)
    assert script.paths() == ["/operations"] * 2


def test_what_is_not_done_when_the_reply_comes_is_polled_for(channel: HttpChannel, script: Script):
    pending = Reply("s", 408, JSON, b'{"request_id": "s", "type": "try_again"}')
    script.answers = [together(reply_of_pass(), pending), (200, {"metrics": {"grad_norm:mean": 5.0}})]
    passed, stepped = channel.submit(a_pass(1)), channel.submit(STEP)
    assert stepped.result(10) == m.OptimStepResponse(metrics={"grad_norm:mean": 5.0})
    passed.result(10)
    assert script.paths() == ["/operations", "/retrieve_future"]
    assert script.seen[1][2]["request_id"] == "s"


def test_each_operation_has_its_own_error(channel: HttpChannel, script: Script):
    refused = Reply("", 400, JSON, b'{"error": "data[0]: token 9 is too large", "category": "user"}')
    failed = Reply("s", 200, JSON, b'{"error": "the model failed", "category": "server"}')
    script.answers = [together(refused, failed)]
    passed, stepped = channel.submit(a_pass(1)), channel.submit(STEP)
    with pytest.raises(InvalidRequest, match="token 9 is too large"):
        passed.result(10)
    with pytest.raises(RequestFailed, match="the model failed") as caught:
        stepped.result(10)
    assert caught.value.request_id == "s"


def test_an_operation_that_met_a_limit_is_tried_alone_until_it_passes(channel: HttpChannel, script: Script):
    limited = Reply("", 429, JSON, b'{"error": "too many", "category": "user"}')
    script.answers = [
        together(reply_of_pass(), limited),
        (429, {"error": "too many", "category": "user"}),
        (200, {"request_id": "s"}),
        (200, {"metrics": {"grad_norm:mean": 1.0}}),
    ]
    passed, stepped = channel.submit(a_pass(1)), channel.submit(STEP)
    passed.result(10)
    assert stepped.result(10) == m.OptimStepResponse(metrics={"grad_norm:mean": 1.0})
    assert script.paths() == ["/operations", "/optim_step", "/optim_step", "/retrieve_future"]


def test_a_broken_connection_fails_none_of_them(channel: HttpChannel, script: Script):
    script.answers = [None, together(reply_of_pass(), reply_of_step())]
    passed, stepped = channel.submit(a_pass(1)), channel.submit(STEP)
    assert passed.result(10) and stepped.result(10)
    bodies = [body for _, _, body in script.seen]
    assert len(bodies) == 2 and bodies[0] == bodies[1]


# ---------------------------------------------------------------- samples


def a_sample(seq_id: int) -> m.SampleRequest:
    return m.SampleRequest(
        sampling_session_id="s",
        seq_id=seq_id,
        prompt=ModelInput.from_ints([1, 2]),
        sampling_params=SamplingParams(max_tokens=4),
    )


def reply_of_sample(seq_id: int) -> Reply:
    body = codec.encode_sample(SampleResponse([SampledSequence("length", [seq_id])]))
    return Reply(f"sample-{seq_id}", 200, PROTOBUF, body)


def tokens_of(future: Future[Any]) -> list[int]:
    return future.result(10).sequences[0].tokens


def test_a_sample_is_one_request_and_its_reply(channel: HttpChannel, script: Script):
    script.answers = [together(reply_of_sample(7))]
    assert tokens_of(channel.submit(a_sample(7))) == [7]
    [(path, _, body)] = script.seen
    [sent] = operations.decode_request(body)
    assert path == "/api/v1/operations" and sent.endpoint.path == "/asample"
    assert codec.decode_json(m.SampleRequest, sent.body).seq_id == 7


def test_no_sample_waits_for_another(channel: HttpChannel, script: Script):
    first_may_end = threading.Event()

    def answer_to(body: bytes) -> Answer:
        [posted] = operations.decode_request(body)
        seq_id = codec.decode_json(m.SampleRequest, posted.body).seq_id
        if seq_id == 0:
            assert first_may_end.wait(10)
        return together(reply_of_sample(seq_id))

    script.answer_to = answer_to
    slow, *quick = [channel.submit(a_sample(i)) for i in range(8)]
    assert [tokens_of(future) for future in quick] == [[i] for i in range(1, 8)]
    assert not slow.done()
    first_may_end.set()
    assert tokens_of(slow) == [0] and script.paths() == ["/operations"] * 8


def test_a_sample_that_is_not_done_or_met_a_limit_goes_on_alone(channel: HttpChannel, script: Script):
    pending = Reply("sample-1", 408, JSON, b'{"request_id": "sample-1", "type": "try_again"}')
    limited = Reply("", 429, JSON, b'{"error": "too many", "category": "user"}')
    script.answers = [together(pending), (200, reply_of_sample(1).body)]
    assert tokens_of(channel.submit(a_sample(1))) == [1]
    script.answers = [
        None,
        together(limited),
        (429, {"error": "too many", "category": "user"}),
        (200, {"request_id": "sample-2"}),
        (200, reply_of_sample(2).body),
    ]
    assert tokens_of(channel.submit(a_sample(2))) == [2]
    assert script.paths() == [
        *("/operations", "/retrieve_future"),
        *("/operations", "/operations", "/asample", "/asample", "/retrieve_future"),
    ]


def test_a_sample_that_failed_or_was_refused_says_why(channel: HttpChannel, script: Script):
    failed = Reply("sample-1", 200, JSON, b'{"error": "the model failed", "category": "server"}')
    refused = Reply("", 409, JSON, b'{"error": "seq_id: 2 was used before", "category": "user"}')
    script.answers = [together(failed), together(refused)]
    with pytest.raises(RequestFailed, match="the model failed") as caught:
        channel.submit(a_sample(1)).result(10)
    assert caught.value.request_id == "sample-1"
    with pytest.raises(TwinkleError, match="was used before"):
        channel.submit(a_sample(2)).result(10)


def test_a_sample_that_is_given_up_while_its_reply_is_waited_for_is_cancelled(
    channel: HttpChannel, script: Script
):
    waited_for, cancelled = threading.Event(), threading.Event()

    def answer_to(body: Any) -> Answer:
        if isinstance(body, bytes) and body[:1] != b"{":
            waited_for.set()
            cancelled.wait(10)
            return together(Reply("sample-3", 200, JSON, b'{"error": "cancelled", "category": "user"}'))
        values = json.loads(body)
        if "request_id" in values:
            cancelled.set()
            return 200, {}
        return 200, {"request_id": "sample-3"}

    script.answer_to = answer_to
    sampling = channel.submit(a_sample(3))
    assert waited_for.wait(10) and sampling.cancel() and cancelled.wait(10)
    assert script.paths() == ["/operations", "/asample", "/cancel_future"]
    [sent] = operations.decode_request(script.seen[0][2])
    assert json.loads(sent.body) == script.seen[1][2] and script.seen[2][2]["request_id"] == "sample-3"
