"""What answers is a proxy, or another server than a Twinkle server: said at once or soon, with the proxy's name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from twinkle.protocol import messages as m
from twinkle.protocol.errors import ConnectionFailed
from twinkle_client import http_channel
from twinkle_client.http_channel import HttpChannel
from twinkle_client.settings import Settings

Answer = tuple[int, str, bytes]
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(http_channel, "UNREACHED_RETRY_SECONDS", 0.6)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that gives one answer to whatever it is asked; its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                status, kind, body = answer
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(channel: HttpChannel) -> None:
    channel.ask(m.GetServerCapabilities()).result(60)


def test_a_proxy_that_reaches_nobody_is_named_by_every_call(
    serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve((503, "text/html", b"<h1>no route to host</h1>"))
    monkeypatch.setenv("HTTP_PROXY", proxy)
    channel = HttpChannel(Settings("http://gpu-host:8000", None))
    for _ in range(2):  # the second would wait for 300 s if the proxy's answer counted as the server's
        with pytest.raises(
            ConnectionFailed, match=rf"through the proxy {proxy} .*HTTP 503, '<h1>no route to host"
        ):
            ask(channel)
    channel.close()


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://me:secret@127.0.0.1:9")
    channel = HttpChannel(Settings("http://gpu-host:8000", None))
    with pytest.raises(
        ConnectionFailed, match=r"can't be reached through the proxy http://127.0.0.1:9 "
    ) as caught:
        ask(channel)
    assert "secret" not in str(caught.value)
    channel.close()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "gopher://127.0.0.1:9", "socks4://127.0.0.1:9"])
def test_a_proxy_that_can_not_be_used_is_named_each_time(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    channel = HttpChannel(Settings("http://gpu-host:8000", None))
    for _ in range(2):
        with pytest.raises(ConnectionFailed, match=rf"through the proxy {proxy} "):
            ask(channel)
    channel.close()


@pytest.mark.parametrize(
    "answer",
    [
        (200, "text/html", b"<html>Sign in to the network</html>"),
        (302, "text/html", b"moved"),
        (404, "text/html", b"<h1>nginx</h1>"),
        (407, "text/html", b"who are you"),
        (413, "text/plain", b"too large"),
        (404, "application/json", b'{"detail": "Not Found"}'),
        (502, "application/json", b"[]"),
        (200, "text/plain", b""),
    ],
)
def test_another_server_is_said_to_be_one(serve: Callable[[Answer], str], answer: Answer) -> None:
    address = serve(answer)
    channel = HttpChannel(Settings(address, None))
    for _ in range(2):
        with pytest.raises(
            ConnectionFailed, match=rf"what answers at {address} is no Twinkle server.*HTTP {answer[0]}"
        ):
            ask(channel)
    channel.close()
