"""A whole service on the fake backend, in milliseconds, and clients of it without a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinkle.protocol import messages as m
from twinkle.server.app import build_parts
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig, TrainingBackend
from twinkle.server.config import LimitsSection, ModelSection, SamplerSection, ServerConfig, StorageSection
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.service.service import Service
from twinkle.server.store.files import LocalFiles
from twinkle.server.store.run_files import RunFiles

MODEL = "fake/model"


def make_service(
    directory: Path,
    backend: TrainingBackend | None = None,
    capacity: int = 4,
    model: str = MODEL,
    adapter_bytes: int | None = None,
    limits: LimitsSection | None = None,
    database_url: str | None = None,
    engine: str | None = None,
) -> Service:
    """
    Args:
        adapter_bytes: what resident adapters may take.
        database_url: default: of a SQLite file in `directory`.
        engine: its name among several.
    """
    worker = LocalWorker(backend or FakeBackend(ModelConfig(Path("fake"))), FakeEngine())
    config = make_config(directory, model, capacity, adapter_bytes, limits, database_url)
    return Service(build_parts(config, worker, RunFiles(LocalFiles(directory / "runs")), engine=engine))


def make_config(
    directory: Path,
    model: str = MODEL,
    capacity: int = 64,
    adapter_bytes: int | None = None,
    limits: LimitsSection | None = None,
    database_url: str | None = None,
) -> ServerConfig:
    return ServerConfig(
        model=ModelSection(model_id=model, max_resident_adapter_bytes=adapter_bytes),
        sampler=SamplerSection(max_resident_adapters=capacity),
        storage=StorageSection(
            root=directory, database_url=database_url or f"sqlite:///{directory / 'test.sqlite'}"
        ),
        limits=limits or LimitsSection(),
    )


class Tenant:
    """A client of the service, without a channel."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.name = name

    async def session(self) -> str:
        return (await self.ask(m.CreateSessionRequest())).session_id

    async def run(self, **lora: Any) -> str:
        """A new run's id."""
        config = m.LoraConfig.model_validate({"rank": 2, "seed": 0, **lora})
        request = m.CreateModelRequest(
            session_id=await self.session(), model_seq_id=0, base_model=MODEL, lora_config=config
        )
        return (await self.do(request)).model_id

    async def do(self, request: m.Operation) -> Any:
        """Submit and wait."""
        return await self.outcome(await self.service.submit(self.name, request))

    async def outcome(self, promise: m.Promise) -> Any:
        return await self.service.retrieve(self.name, promise.request_id, timeout=20)

    async def ask(self, query: m.Query[m.ReplyT]) -> m.ReplyT:
        return await self.service.ask(self.name, query)
