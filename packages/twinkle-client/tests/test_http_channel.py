"""The channel against a real HTTP server on loopback that misbehaves as networks and servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from twinkle.protocol import messages as m
from twinkle.protocol.errors import ConnectionFailed, InvalidRequest, NotFound, RequestFailed, TwinkleError
from twinkle_client.http_channel import HttpChannel
from twinkle_client.settings import Settings

Answer = tuple[int, dict]
STEP = m.OptimStepRequest(model_id="run", seq_id=1)


class Script:
    """What the server does, request by request; everything it was sent."""

    def __init__(self) -> None:
        self.answers: list[Callable[[], Answer] | Answer | None] = []
        self.seen: list[tuple[str, dict, dict]] = []

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
            script.seen.append((self.path, dict(self.headers), json.loads(body or b"{}")))
            answer = script.answers.pop(0)
            if answer is None:  # the connection breaks before an answer
                self.close_connection = True
                self.connection.close()
                return
            status, values = answer() if callable(answer) else answer
            encoded = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
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
        Settings(f"http://127.0.0.1:{server.server_address[1]}", "the-key"), patience_seconds=5
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
        (200, {"metrics": {"grad_norm:mean": 2.0}}),
    ]
    assert channel.submit(STEP).result(10) == m.OptimStepResponse(metrics={"grad_norm:mean": 2.0})
    assert script.paths() == ["/optim_step"] + ["/retrieve_future"] * 3
    assert all(headers["X-API-Key"] == "the-key" for _, headers, _ in script.seen)


def test_a_broken_connection_a_limit_and_a_dying_proxy_are_tried_again_with_the_same_body(
    channel: HttpChannel, script: Script
):
    script.answers = [
        None,
        (429, {"error": "slow down", "category": "user"}),
        (503, {"unrelated": "Service Unavailable"}),
        (200, {"request_id": "r"}),
        None,
        (200, {"metrics": {}}),
    ]
    channel.submit(STEP).result(20)
    assert script.paths() == ["/optim_step"] * 4 + ["/retrieve_future"] * 2
    bodies = [body for path, _, body in script.seen if path.endswith("optim_step")]
    assert bodies[0] == bodies[-1] and bodies[0]["seq_id"] == 1


def test_what_the_server_said_is_what_is_raised(channel: HttpChannel, script: Script):
    script.answers = [(400, {"error": "rank: too high", "category": "user"})]
    with pytest.raises(InvalidRequest, match="rank: too high"):
        channel.submit(STEP).result(10)
    script.answers = [(404, {"error": "model_id: no live run", "category": "user"})]
    with pytest.raises(NotFound):
        channel.ask(m.GetInfoRequest(model_id="x")).result(10)


def test_an_accepted_operation_that_failed_names_its_category_and_request(
    channel: HttpChannel, script: Script
):
    script.answers = [(200, {"request_id": "r"}), (200, {"error": "too large", "category": "user"})]
    with pytest.raises(RequestFailed, match="too large") as caught:
        channel.submit(STEP).result(10)
    assert (caught.value.category, caught.value.request_id) == ("user", "r")


def test_a_fault_of_the_service_itself_is_final(channel: HttpChannel, script: Script):
    script.answers = [(500, {"error": "error id 123", "category": "server"})]
    with pytest.raises(Exception, match="error id 123"):
        channel.submit(STEP).result(10)
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
    channel = HttpChannel(Settings("http://127.0.0.1:9", None), patience_seconds=0.1)
    with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9 can't be reached.*TWINKLE_BASE_URL"):
        channel.ask(m.GetServerCapabilities()).result(10)
    channel.close()


def test_a_plain_server_asked_by_https_gets_a_hint(channel: HttpChannel, script: Script):
    script.answers.append((200, {}))
    address = channel._settings.base_url.replace("http://", "https://")
    other = HttpChannel(Settings(address, None), patience_seconds=0.1)
    with pytest.raises(ConnectionFailed, match="A server without certificates is reached by http://"):
        other.submit(STEP).result(20)
    other.close()


def test_a_channel_that_is_closed_stays_closed():
    channel = HttpChannel(Settings("http://127.0.0.1:9", None))
    channel.close()
    with pytest.raises(TwinkleError, match="this ServiceClient is closed; make a new one"):
        channel.submit(STEP)
