"""The real SDK, against a server in this process that answers what it asks on its way to a sampling client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from threading import Thread
from typing import Any

import pytest
import tinker
from tinker.types import ParsedCheckpointTinkerPath

from twinkle_tinker_patch import init_tinker_client, unpatch


@dataclass(frozen=True)
class Seen:
    """One request: its path below /api/v1, the key it carried, its body."""

    path: str
    api_key: str | None
    body: dict[str, Any]


@dataclass
class RecordingServer:
    base_url: str
    seen: list[Seen] = field(default_factory=list[Seen])

    def only(self, path: str) -> Seen:
        (found,) = [request for request in self.seen if request.path == path]
        return found


REPLIES: dict[str, dict[str, Any]] = {
    "/create_session": {"session_id": "session-1"},
    "/create_sampling_session": {"sampling_session_id": "sampler-1"},
}


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            path = self.path.removeprefix("/api/v1")
            recording.seen.append(Seen(path, self.headers.get("X-API-Key"), body))
            reply = json.dumps(REPLIES.get(path, {})).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recording = RecordingServer(f"http://127.0.0.1:{http.server_address[1]}")
    thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield recording
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def sdk_as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins and ends with the SDK unpatched, and without the developer's own keys."""
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY", "TINKER_CREDENTIAL_CMD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    yield
    unpatch()


def open_sampling_session(
    service: tinker.ServiceClient, model_path: str = "tinker://run/sampler_weights/last"
) -> None:
    service.create_sampling_client(model_path=model_path, base_model="Qwen/Qwen3.5-4B").result(timeout=60)
    service.close("success").result(timeout=60)


def test_a_program_reaches_the_server_with_a_key_of_any_form(server: RecordingServer) -> None:
    init_tinker_client(base_url=server.base_url, api_key="sk-of-our-own")
    open_sampling_session(tinker.ServiceClient())
    assert {request.api_key for request in server.seen} == {"sk-of-our-own"}


@pytest.mark.parametrize("key", ["sk-1", "tml-2", "eyJ-not-a-token"])
def test_a_key_given_to_the_client_goes_before_the_one_given_here(server: RecordingServer, key: str) -> None:
    init_tinker_client(base_url="http://127.0.0.1:1", api_key="not-this-one")
    open_sampling_session(tinker.ServiceClient(base_url=server.base_url, api_key=key))
    assert {request.api_key for request in server.seen} == {key}


def test_without_any_key_none_is_sent(server: RecordingServer) -> None:
    init_tinker_client()
    open_sampling_session(tinker.ServiceClient(base_url=server.base_url, api_key=None))
    assert {request.api_key for request in server.seen} == {None}


def test_a_key_in_the_environment_stays(server: RecordingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-from-the-shell")
    init_tinker_client(base_url=server.base_url)
    open_sampling_session(tinker.ServiceClient())
    assert {request.api_key for request in server.seen} == {"tml-from-the-shell"}


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("twinkle://my-lora-checkpoint", "tinker://my-lora-checkpoint"),
        ("twinkle://run:train:0/sampler_weights/final", "tinker://run:train:0/sampler_weights/final"),
        ("tinker://run:train:0/sampler_weights/final", "tinker://run:train:0/sampler_weights/final"),
    ],
)
def test_sampling_takes_both_schemes(server: RecordingServer, given: str, sent: str) -> None:
    init_tinker_client(base_url=server.base_url, api_key="any")
    open_sampling_session(tinker.ServiceClient(), given)
    assert server.only("/create_sampling_session").body["model_path"] == sent


def test_checkpoint_paths_of_both_schemes_parse_to_what_was_given() -> None:
    init_tinker_client()
    parsed = ParsedCheckpointTinkerPath.from_tinker_path("twinkle://run/weights/step-3")
    assert (parsed.training_run_id, parsed.checkpoint_type, parsed.checkpoint_id) == (
        "run",
        "training",
        "weights/step-3",
    )
    assert parsed.tinker_path == "twinkle://run/weights/step-3"
    with pytest.raises(ValueError, match="https://run/weights/step-3"):
        ParsedCheckpointTinkerPath.from_tinker_path("https://run/weights/step-3")


def test_unpatch_puts_sdk_and_environment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", "http://before")
    auth = import_module("tinker.lib._auth_token_provider").ApiKeyAuthProvider
    before: object = vars(auth)["__init__"]
    init_tinker_client(base_url="http://first", api_key="first")
    init_tinker_client(base_url="http://second")
    assert (os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"]) == ("http://second", "first")
    unpatch()
    assert vars(auth)["__init__"] is before
    assert os.environ["TINKER_BASE_URL"] == "http://before"
    assert "TINKER_API_KEY" not in os.environ
    with pytest.raises(ValueError, match="Invalid tinker path"):
        ParsedCheckpointTinkerPath.from_tinker_path("twinkle://run/weights/step-3")


def test_a_missing_sdk_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "tinker" or name.startswith("tinker.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ImportError, match=r"pip install 'twinkle-tinker-patch\[sdk\]'"):
        init_tinker_client(api_key="any")
    assert "TINKER_API_KEY" not in os.environ


def test_an_sdk_of_another_make_is_refused_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = import_module("tinker.lib.internal_client_holder").InternalClientHolder
    auth = import_module("tinker.lib._auth_token_provider").ApiKeyAuthProvider
    before: object = vars(auth)["__init__"]
    monkeypatch.delattr(holder, "_create_sampling_session")
    with pytest.raises(ImportError, match=r"_create_sampling_session.*pip install 'tinker==0\.38\.0'"):
        init_tinker_client(api_key="any")
    assert vars(auth)["__init__"] is before


def test_importing_the_package_leaves_the_sdk_alone() -> None:
    code = "import sys, twinkle_tinker_patch; sys.exit('tinker' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
