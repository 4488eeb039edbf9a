"""A server of two processes that read HTTP: either tells whether it is ready, and answers alike, strangers too."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import running_server

from twinkle.protocol import codec
from twinkle.protocol.endpoints import PREFIX

pytestmark = pytest.mark.serve

CONFIG = """
model: {{model_id: Qwen/Qwen3.5-4B}}
server: {{port: {port}, num_replicas: 2}}
storage: {{root: {root}}}
auth: {{mode: open}}
"""


def post(connection: http.client.HTTPConnection, path: str, body: object) -> tuple[int, bytes]:
    connection.request("POST", PREFIX + path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def sampled(connection: http.client.HTTPConnection) -> str:
    """The id of a sample whose result is large."""

    def ask(path: str, **body: Any) -> dict[str, Any]:
        status, reply = post(connection, path, body)
        assert status == 200, reply
        return json.loads(reply)

    session = ask("/create_session")["session_id"]
    sampler = ask(
        "/create_sampling_session",
        session_id=session,
        sampling_session_seq_id=0,
        base_model="Qwen/Qwen3.5-4B",
    )
    sample = {
        "sampling_session_id": sampler["sampling_session_id"],
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "num_samples": 32,
        "sampling_params": {"max_tokens": 40, "stop": []},
        "topk_sample_logprobs": 200,
    }
    return ask("/asample", **sample)["request_id"]


def test_each_process_answers_the_same_and_ends_a_head_without_end(hub_root: Path, tmp_path: Path):
    unused_port = running_server.free_port()
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(port=unused_port, root=tmp_path / "storage"), encoding="utf-8")
    server = running_server.start(path, hub_root, unused_port)
    try:
        # The system spreads connections over the processes: among so many there are some of each.
        connections = [http.client.HTTPConnection("127.0.0.1", unused_port, timeout=60) for _ in range(12)]
        request_id = sampled(connections[0])
        sizes: set[bytes] = set()
        bodies: set[bytes] = set()
        for connection in connections:
            connection.request("GET", PREFIX + "/readyz")
            ready = connection.getresponse()
            assert ready.status == 200 and json.loads(ready.read()) == {"status": "ready"}
            while (got := post(connection, "/retrieve_future", {"request_id": request_id}))[0] == 408:
                pass
            bodies.add(got[1])
            sizes.add(
                post(connection, "/retrieve_future", {"request_id": request_id, "allow_metadata_only": True})[
                    1
                ]
            )
        [body], [size] = bodies, sizes
        assert json.loads(size)["response_payload_size"] == len(body) > 32 * 40 * 200 * 8
        assert len(codec.decode_sample(body).sequences) == 32
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", unused_port), timeout=60) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 70_000)
                assert stranger.recv(100).startswith(b"HTTP/1.1 431 ")
    finally:
        assert server.stop() == 0
