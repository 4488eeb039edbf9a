"""A hub root with a tiny model under the mission's names, and one real server for all tests that need one."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import cookbook_server
import pytest
import running_server

REPOSITORY = Path(__file__).parents[1]

MODEL = "Qwen/Qwen3.5-4B"
# The mission's scripts say http://localhost:8000.
PORT = 8000


@pytest.fixture(scope="session")
def mission_model_dir(tiny_qwen3_5_dir: Path) -> Path:
    """What stands under the mission's model id."""
    return tiny_qwen3_5_dir


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory: pytest.TempPathFactory, mission_model_dir: Path) -> Path:
    """As TWINKLE_HUB_ROOT wants it: the mission's model id is a tiny model, its data set is the repository's."""
    return _hub_root(tmp_path_factory.mktemp("hub"), mission_model_dir)


@pytest.fixture(scope="session")
def qwen3_hub_root(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The same with a Qwen3 under the mission's model id, for tests that compare weights after many optimizer steps:
    rows in other company differ by rounding, and Adam makes more of that in a Qwen3.5.
    """
    return _hub_root(tmp_path_factory.mktemp("qwen3-hub"), tiny_model_dir)


def _hub_root(root: Path, model: Path) -> Path:
    shutil.copytree(model, root / MODEL)
    shutil.copytree(REPOSITORY / "cookbook" / "data" / "swift", root / "swift")
    return root


@pytest.fixture(scope="session")
def live_server(
    hub_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running_server.RunningServer]:
    """A server on port 8000."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.fail(
                f"port {PORT} of this machine is in use; the mission's scripts need it: free it and run again"
            )
    directory = tmp_path_factory.mktemp("server")
    config = running_server.write_config(directory, PORT, f"ms://{MODEL}")
    server = running_server.start(config, hub_root, PORT)
    server.storage = directory / "storage"
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[running_server.RunningServer]:
    """The cookbook's server with its tiny model, on a port of its own."""
    server = cookbook_server.start("transformer", tmp_path_factory.mktemp("tiny-server"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _hub_root_for_clients(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients in the test's own process find model and data in the same place as the server."""
    for root in ("hub_root", "qwen3_hub_root"):
        if root in request.fixturenames:
            monkeypatch.setenv("TWINKLE_HUB_ROOT", str(request.getfixturevalue(root)))


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's processes would make way for every other program, and starve where tests run beside each other.
os.environ.setdefault("RAY_worker_niceness", "0")
