"""A server starts whatever is set for other programs, and nobody but its user can have Ray run anything."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

import pytest
import running_server
from server_processes import processes_of

from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve


def listening(pids: set[int]) -> dict[tuple[str, int], int]:
    """Addresses that these processes listen on, with a process of each (Linux's tables of sockets)."""
    addresses: dict[str, tuple[str, int]] = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A":
                continue
            host, _, port = fields[1].partition(":")
            words = [struct.pack("<I", int(host[i : i + 8], 16)) for i in range(0, len(host), 8)]
            addresses[fields[9]] = socket.inet_ntop(family, b"".join(words)), int(port, 16)
    found: dict[tuple[str, int], int] = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:[") and target[8:-1] in addresses:
                found[addresses[target[8:-1]]] = pid
    return found


def place_of(server: running_server.RunningServer) -> Path:
    """The directory of its Ray; other tests' servers have others."""
    places: set[str] = set()
    for process in processes_of(server, ""):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            places |= {
                each.decode().partition("=")[2]
                for each in variables
                if each.startswith(b"TWINKLE_RAY_PLACE=")
            }
    [place] = places
    return Path(place)


def test_a_server_starts_in_any_surroundings_and_listens_for_this_machine_alone(
    hub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    long = tmp_path / ("long" * 25)
    long.mkdir()
    home = tmp_path / "home"
    home.touch()  # nothing can be written below it
    for name, value in {
        "RAY_ADDRESS": "192.0.2.1:6379",
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN": "known to others",
        "HOME": str(home),
        "TMPDIR": str(long),
    }.items():
        monkeypatch.setenv(name, value)
    port = running_server.free_port()
    server = running_server.start(running_server.write_config(tmp_path, port), hub_root, port)
    try:
        addresses = listening(processes_of(server, ""))
        assert ("127.0.0.1", port) in addresses
        others = {host for host, _ in addresses} - {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert not others, {
            a: (p, Path(f"/proc/{p}/cmdline").read_bytes()[:80])
            for a, p in addresses.items()
            if a[0] in others
        }
        place = place_of(server)
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE((place / "token").stat().st_mode) == 0o600
        storage = tmp_path / "storage"
        assert [
            stat.S_IMODE((storage / name).stat().st_mode) for name in (".", "live", "twinkle.sqlite")
        ] == [
            0o700,
            0o700,
            0o600,
        ]
        with ServiceClient(base_url=server.base_url, api_key="any") as client:
            client.create_lora_training_client(base_model="Qwen/Qwen3.5-4B", rank=4)
    finally:
        assert server.stop() == 0
    assert not place.exists()
