"""The store that ranks on several machines meet at."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from spawned import sum_of_ranks
from torch.multiprocessing.spawn import spawn

from twinkle.server.backends.meeting import open_store


def test_ranks_meet_at_a_store_that_listens_on_its_address_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store, rendezvous = open_store("127.0.0.1")
    port = int(rendezvous.removeprefix("tcp://127.0.0.1:"))
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    spawn(sum_of_ranks, args=(rendezvous, str(tmp_path)), nprocs=2)
    assert [(tmp_path / rank).read_text(encoding="utf-8") for rank in "01"] == ["3.0", "3.0"]
    del store
