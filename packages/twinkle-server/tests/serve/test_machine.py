"""What differs between the machines of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from twinkle.protocol.errors import NotFound
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.serve import machine


def test_the_model_is_looked_for_on_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    elsewhere = ModelConfig(tmp_path / "of-the-first-machine")
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path))
    with pytest.raises(NotFound, match="org/model"):
        machine.on_this_machine(elsewhere, "ms://org/model")
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text("{}", encoding="utf-8")
    assert machine.on_this_machine(elsewhere, "ms://org/model").path == tmp_path / "org" / "model"
    assert machine.on_this_machine(elsewhere, None) is elsewhere
    here = ModelConfig(tmp_path)
    assert machine.on_this_machine(here, "ms://org/model") is here


def test_the_interface_is_the_one_with_the_address_unless_it_is_named(monkeypatch: pytest.MonkeyPatch):
    assert machine.interface_of("127.0.0.1") == "lo"
    assert machine.interface_of("203.0.113.1") is None
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    machine.use_interface(None)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "lo")
    machine.use_interface("ib0")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
