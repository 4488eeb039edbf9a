"""The port of a server that has just been killed."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.config import parse_config
from twinkle.server.serve import launch


@pytest.fixture
def taken() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def server_on(listener: socket.socket, directory: Path) -> launch.TwinkleServer:
    port = listener.getsockname()[1]
    config = {
        "model": {"model_id": str(directory)},
        "server": {"port": port},
        "storage": {"root": str(directory)},
    }
    return launch.TwinkleServer(parse_config(config))


def test_a_port_that_is_let_go_of_soon_is_waited_for(taken: socket.socket, tmp_path: Path):
    timer = threading.Timer(0.3, taken.close)
    timer.start()
    server_on(taken, tmp_path)._check()
    timer.join()


def test_one_that_is_kept_is_said(taken: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_PORT_SECONDS", 0.2)
    with taken, pytest.raises(InvalidRequest, match="Address already in use"):
        server_on(taken, tmp_path)._check()
