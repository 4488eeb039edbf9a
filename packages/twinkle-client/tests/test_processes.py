"""Clients in several processes: forked, pickled, and ended while the server is gone. The server is a small one here."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, PROTOBUF
from twinkle.protocol.operations import Reply
from twinkle.protocol.types import SampledSequence, SampleResponse
from twinkle.verbs.sampling import SamplingClient
from twinkle.verbs.training import TrainingClient
from twinkle_client import ServiceClient
from twinkle_client.http_channel import HttpChannel
from twinkle_client.settings import Settings


class Server:
    """Answers each sample with its number (mod 2^31, as tokens are); remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                path = self.path.removeprefix("/api/v1")
                posted = operations.decode_request(body)[0] if path == operations.PATH else None
                is_sample = posted is not None and posted.endpoint.path == "/asample"
                if posted is not None and is_sample:
                    path, body = "/asample", posted.body
                values = json.loads(body or b"{}") if body[:1] in (b"", b"{") else {}
                outer.asked.append((path, values))
                status, kind, encoded = 200, JSON, b""
                if is_sample:
                    sequence = SampledSequence("length", [values["seq_id"] % 2**31])
                    result = codec.encode_sample(SampleResponse([sequence]))
                    reply = Reply(f"sample{values['seq_id']}", 200, PROTOBUF, result)
                    kind, encoded = PROTOBUF, operations.encode_reply([reply])
                elif path == operations.PATH:
                    pending = json.dumps({"request_id": "never"}).encode()
                    kind, encoded = PROTOBUF, operations.encode_reply([Reply("never", 408, JSON, pending)])
                else:
                    encoded = json.dumps(outer.answer(path, values)).encode()
                    status = 408 if values.get("request_id") == "never" else 200
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, values: dict[str, Any]) -> dict[str, Any]:
        if path == "/create_session":
            return {"session_id": f"s{len(self.named(path))}"}
        if path == "/create_sampling_session":
            return {"sampling_session_id": f"{values['session_id']}:sample:0"}
        if path == "/create_model":
            return {"request_id": "model"}
        if path == "/retrieve_future" and values["request_id"] == "model":
            return {"model_id": "run"}
        if path == "/retrieve_future" and values["request_id"] == "never":
            time.sleep(0.1)
            return {"request_id": "never", "type": "try_again"}
        return {}

    def named(self, path: str) -> list[dict[str, Any]]:
        return [values for asked, values in self.asked if asked == path]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of its own; the time is there to end one that hangs."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
    )


FORKING = """
import os, sys
from concurrent.futures import Future
from twinkle.protocol.errors import TwinkleError
from twinkle.verbs.futures import Pending
from twinkle_client import ServiceClient
service = ServiceClient(sys.argv[1])
training = service.create_lora_training_client(base_model="m")
sampling = service.create_sampling_client(base_model="m")
first = sampling.sample([1]).result().sequences[0].tokens[0]
under_way = Pending(Future(), "sample")
child = os.fork()
number = sampling.sample([1]).result().sequences[0].tokens[0]
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert (first, number) == (0, 1), (first, number)
    service.close()
else:
    assert number != 1, number  # the parent's answer to its second sample is not the child's
    for call in (training.optim_step, training.flush, under_way.result):
        try:
            call()
            raise SystemExit("answered")
        except TwinkleError as error:
            assert "fork" in str(error), error
    other = service.create_sampling_client(base_model="m")
    assert other.sampling_session_id.startswith("s2:"), other.sampling_session_id
sys.exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_a_forked_process_gets_answers_of_its_own_or_an_error_at_once(server: Server) -> None:
    done = run(FORKING, server.url)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    ended = [path for path, _ in server.asked if path.endswith("/finish")]
    assert sorted(ended) == ["/sessions/s1/finish", "/sessions/s2/finish"]
    # The child ended its own session and left the parent's alone.
    assert ended[0] == "/sessions/s2/finish"


PICKLED = """
import pickle, sys
client = pickle.loads(bytes.fromhex(sys.argv[1]))
print(client.sample([1]).result().sequences[0].tokens[0])
"""


def test_a_sampling_client_can_be_pickled(server: Server) -> None:
    channel = HttpChannel(Settings(server.url, "the-key"))
    client = SamplingClient(channel, "s1:sample:0")
    assert client.sample([1]).result(30).sequences[0].tokens == [0]
    copies = [pickle.loads(pickle.dumps(client)) for _ in range(3)]
    done = run(PICKLED, pickle.dumps(client).hex())
    assert done.returncode == 0, done.stderr
    numbers = [copy.sample([1]).result(30).sequences[0].tokens[0] for copy in copies] + [int(done.stdout)]
    assert len({0, *numbers}) == 5
    asked = [values["seq_id"] for values in server.named("/asample")]
    assert len(set(asked)) == 5 and all(10**9 <= number < 2**63 for number in asked[1:])
    assert {values["sampling_session_id"] for values in server.named("/asample")} == {"s1:sample:0"}
    assert copies[0]._channel is copies[1]._channel
    copies[0]._channel.close()
    another = pickle.loads(pickle.dumps(client))
    assert another.sample([1]).result(30).sequences[0].tokens[0] not in {0, *numbers}
    another._channel.close()
    channel.close()


def test_a_training_client_says_why_it_can_not_be_pickled() -> None:
    channel = HttpChannel(Settings("http://127.0.0.1:9", None))
    client = TrainingClient(channel, "run", "s", itertools.count())
    with pytest.raises(TypeError, match=r"numbered, by one process alone.*create_training_client_from_state"):
        pickle.dumps(client)
    channel.close()


def test_queries_can_be_pickled(server: Server) -> None:
    rest = ServiceClient(server.url).create_rest_client()
    again = pickle.loads(pickle.dumps(rest))
    again._channel.ask(m.FinishSessionRequest(session_id="s")).result(30)
    again._channel.close()


UNCLOSED = """
import sys
from twinkle_client import ServiceClient, http_channel
http_channel.EXIT_RETRY_SECONDS = 0.5
service = ServiceClient(sys.argv[1])
{what}
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "what",
    [
        'service.create_sampling_client(base_model="m")',
        'service.create_lora_training_client(base_model="m").optim_step()',
    ],
)
def test_a_program_ends_and_says_so_when_its_server_is_gone(server: Server, what: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", UNCLOSED.format(what=what), server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
        server.stop()
        _, said = program.communicate("\n", timeout=120)  # forever without a bound: it is retried for 300 s
    finally:
        program.kill()
    assert program.returncode == 0
    assert f"the server at {server.url} can't be reached" in said
