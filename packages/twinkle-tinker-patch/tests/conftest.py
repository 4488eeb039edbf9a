"""A server in this process that answers what the real SDK asks on its way to a client, and keeps what it was asked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from twinkle_tinker_patch import unpatch

BASE_MODEL = "twinkle-tests/not-on-any-hub"


@dataclass(frozen=True)
class Seen:
    """One request: its path (below /api/v1, where it lies there), its query, the key it carried, its body."""

    path: str
    query: dict[str, str]
    api_key: str | None
    body: dict[str, Any]


@dataclass
class RecordingServer:
    """What it answers is JSON, and bytes where `files` has the path; what it knows nothing of, it answers with {}."""

    base_url: str
    replies: dict[str, dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    statuses: dict[str, int] = field(default_factory=lambda: {"/session_heartbeat": 410})
    seen: list[Seen] = field(default_factory=list[Seen])

    def asked(self, path: str) -> list[Seen]:
        return [request for request in self.seen if request.path == path]

    def only(self, path: str) -> Seen:
        (found,) = self.asked(path)
        return found

    def answer(self, target: str, api_key: str | None, body: dict[str, Any]) -> tuple[int, str, bytes]:
        """Status, content type and body of the reply."""
        url = urlsplit(target)
        path = url.path.removeprefix("/api/v1")
        self.seen.append(Seen(path, dict(parse_qsl(url.query)), api_key, body))
        status = self.statuses.get(path, 200)
        if path in self.files:
            return status, "application/octet-stream", self.files[path]
        reply = self.replies.get(path, {} if status == 200 else {"detail": f"stub: {status}"})
        return status, "application/json", json.dumps(reply).encode()


def _replies() -> dict[str, dict[str, Any]]:
    model_id = "session-1:train:0"
    return {
        "/create_session": {"session_id": "session-1"},
        "/create_sampling_session": {"sampling_session_id": "sampler-1"},
        "/samplers/sampler-1": {"sampler_id": "sampler-1", "base_model": BASE_MODEL},
        "/create_model": {"request_id": "request-1", "model_id": model_id},
        "/retrieve_future": {"type": "create_model", "model_id": model_id},
        "/get_info": {
            "model_id": model_id,
            "model_data": {"arch": "tiny", "model_name": BASE_MODEL, "tokenizer_id": BASE_MODEL},
            "is_lora": True,
            "lora_rank": 8,
        },
    }


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            status, kind, reply = recording.answer(self.path, self.headers.get("X-API-Key"), body)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_POST = do_GET
        do_DELETE = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recording = RecordingServer(f"http://127.0.0.1:{http.server_address[1]}", _replies())
    thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    # It stays up: clients of tests that have ended still send heartbeats, and 410 tells them to stop.
    yield recording


@pytest.fixture(autouse=True)
def sdk_as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins and ends with the SDK unpatched, and without the developer's own settings."""
    for product in ("TINKER", "TWINKLE"):
        for setting in ("BASE_URL", "API_KEY", "CREDENTIAL_CMD", "HUB_ROOT", "TINKER_PATCH"):
            monkeypatch.delenv(f"{product}_{setting}", raising=False)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    yield
    unpatch()
