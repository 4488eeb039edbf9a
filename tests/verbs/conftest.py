"""The same verbs over both channels: a real server, and local mode in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from twinkle.protocol import uris
from twinkle.verbs.service import ServiceClientBase

MODEL = "Qwen/Qwen3.5-4B"


@dataclass(frozen=True)
class Verbs:
    """A way to reach the service.

    Attributes:
        connect: a new service client; each key is a tenant (local mode has one tenant only).
        storage: where the service keeps its checkpoints.
    """

    connect: Callable[[str], ServiceClientBase]
    storage: Path
    has_tenants: bool

    def directory(self, path: str) -> Path:
        """The files of a checkpoint."""
        uri = uris.parse(path)
        assert uri.run_id and uri.kind
        return self.storage / "checkpoints" / uri.run_id / uri.kind / uri.name


@pytest.fixture(scope="session")
def local_verbs(hub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verbs]:
    from twinkle.server.config import parse_config
    from twinkle.server.local import ServiceClient

    storage = tmp_path_factory.mktemp("local-storage")
    config = parse_config(
        {
            "model": {"model_id": MODEL, "torch_dtype": "float32"},
            "ray": {"num_gpus": 0},
            "storage": {"root": str(storage)},
        }
    )
    client = ServiceClient(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINKLE_HUB_ROOT", str(hub_root))
        client.create_sampling_client(base_model=MODEL)  # loads the model
    yield Verbs(lambda _key: client, storage, has_tenants=False)
    client.close()


@pytest.fixture(scope="session")
def remote_verbs(live_server) -> Iterator[Verbs]:
    from twinkle_client import ServiceClient

    clients: dict[str, ServiceClient] = {}

    def connect(key: str) -> ServiceClient:
        if key not in clients:
            clients[key] = ServiceClient(base_url=live_server.base_url, api_key=key)
        return clients[key]

    yield Verbs(connect, live_server.storage, has_tenants=True)
    for client in clients.values():
        client.close()


@pytest.fixture(params=["local", pytest.param("remote", marks=pytest.mark.serve)])
def verbs(request: pytest.FixtureRequest) -> Verbs:
    return request.getfixturevalue(f"{request.param}_verbs")
