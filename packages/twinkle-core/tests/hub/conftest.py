"""A hub to download from: the parts of both public hubs' APIs that their clients use, served on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandInHub:
    """Repositories by kind and id, and what was asked for.

    Attributes:
        files: ("model" or "dataset", "org/name") -> path in the repository -> content.
        downloaded: paths in repositories that were fetched, in order.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(
        default_factory=dict[tuple[str, str], dict[str, bytes]]
    )
    downloaded: list[str] = field(default_factory=list[str])
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    """Answers for one `StandInHub`, set on a subclass."""

    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        parts, query = unquote(split.path).strip("/").split("/"), parse_qs(split.query)
        if parts == [""]:
            self._send(200, b"a hub")
        elif parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[0] == "api":
            self._huggingface_listing(parts[1:])
        else:
            self._huggingface_file(parts)

    def _huggingface_listing(self, parts: list[str]) -> None:
        id = "/".join(parts[1:3])
        files = self.hub.files.get((parts[0].removesuffix("s"), id))
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[3] == "tree":
            self._send_json(
                [
                    {"type": "file", "path": path, "size": len(text), "oid": "0"}
                    for path, text in files.items()
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in files]
            self._send_json({"id": id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def _huggingface_file(self, parts: list[str]) -> None:
        kind, rest = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        path = "/".join(rest[4:])
        content = self.hub.files[kind, "/".join(rest[:2])][path]
        self._count(path)
        self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _modelscope(self, parts: list[str], query: dict[str, list[str]]) -> None:
        files = self.hub.files.get((parts[0].removesuffix("s"), "/".join(parts[1:3])))
        if files is None:
            self._send(
                404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode()
            )
        elif parts[3:] in (["repo", "files"], ["repo", "tree"]):
            listed = [
                {"Path": path, "Type": "blob", "Size": len(text), "Sha256": hashlib.sha256(text).hexdigest()}
                for path, text in files.items()
            ]
            self._send_json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        else:
            [path] = query["FilePath"]
            self._count(path)
            self._send(200, files[path])

    def _count(self, path: str) -> None:
        if self.command == "GET":
            self.hub.downloaded.append(path)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def stand_in_hub() -> Iterator[StandInHub]:
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass(frozen=True)
class Resolved:
    """What a process of its own got for some ids: a path, or "error type: message", for each."""

    results: list[str]
    stderr: str


Resolve = Callable[..., Resolved]


@pytest.fixture
def resolve_apart(tmp_path: Path) -> Resolve:
    """`(*calls, **environment)`: run `twinkle.hub.resolve` on argument lists in a process with empty caches.

    The hubs' clients read their environment once, when they are imported. Neither has a network: without an endpoint
    from the test theirs is a port that nobody listens on.
    """

    def run(*calls: list[object], **environment: str) -> Resolved:
        program = (
            "import json, sys\n"
            "from twinkle import hub\n"
            "from twinkle.protocol.errors import TwinkleError\n"
            "results = []\n"
            "for arguments in json.loads(sys.argv[1]):\n"
            "    try:\n"
            "        results.append(str(hub.resolve(*arguments)))\n"
            "    except TwinkleError as error:\n"
            "        results.append(f'{type(error).__name__}: {error}')\n"
            "print(json.dumps(results))\n"
        )
        nobody = "http://127.0.0.1:9"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "MODELSCOPE_", "TWINKLE_")) and not name.lower().endswith("_proxy")
        }
        settings = {
            "HOME": str(tmp_path / "home"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": nobody,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "MODELSCOPE_CACHE": str(tmp_path / "ms"),
            "MODELSCOPE_ENDPOINT": nobody,
            "MODELSCOPE_API_MAX_RETRIES": "1",
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
            **environment,
        }
        finished = subprocess.run(
            [sys.executable, "-c", program, json.dumps(calls)],
            env={**inherited, **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert finished.returncode == 0, finished.stderr
        return Resolved(json.loads(finished.stdout.splitlines()[-1]), finished.stderr)

    return run
