"""The cookbook's server for a CPU, and its programs' environment: the tiny model, and nothing from outside."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import running_server

REPOSITORY = Path(__file__).resolve().parents[2]
COOKBOOK = REPOSITORY / "cookbook"
SERVERS = COOKBOOK / "client" / "server"
DATA = COOKBOOK / "data"
MODEL = "twinkle/tiny-qwen3"
# What would lead a program to another server, or name another key.
_PREFIXES = ("TWINKLE_", "TINKER_", "MODELSCOPE_")


def start(backend: str, directory: Path) -> running_server.RunningServer:
    """A server of the cookbook, started by its script with its configuration for a CPU, on the test's port and disk."""
    config = directory / "server_config.yaml"
    text = (SERVERS / backend / "server_config_cpu.yaml").read_text(encoding="utf-8")
    assert "port: 8000" in text
    port = running_server.free_port()
    storage = f"\nstorage:\n  root: {directory / 'storage'}\n"
    config.write_text(text.replace("port: 8000", f"port: {port}") + storage, encoding="utf-8")
    return running_server.start(config, DATA, port, script=SERVERS / backend / "server.py")


def environment(**more: str) -> dict[str, str]:
    """Of a program that finds model and data in the repository, with the commands of this Python's environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_PREFIXES) and name != "API_KEY"
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "TWINKLE_HUB_ROOT": str(DATA), "PYTHONUTF8": "1", **more}
