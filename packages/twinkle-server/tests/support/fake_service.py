"""A whole service on the fake backend, in milliseconds, and clients of it without a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinkle.protocol import messages as m
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig, TrainingBackend
from twinkle.server.config import LimitsSection
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.service.service import Service
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.database import Database
from twinkle.server.store.run_files import RunFiles

MODEL = "fake/model"


def make_service(
    directory: Path,
    backend: TrainingBackend | None = None,
    capacity: int = 4,
    model: str = MODEL,
    adapter_bytes: int | None = None,
    limits: LimitsSection | None = None,
) -> Service:
    """
    Args:
        adapter_bytes: what resident adapters may take.
    """
    worker = LocalWorker(backend or FakeBackend(ModelConfig(Path("fake"))), FakeEngine())
    database = Database(f"sqlite:///{directory / 'test.sqlite'}")
    return Service(
        model,
        worker,
        database,
        CheckpointFiles(directory / "checkpoints"),
        capacity,
        run_files=RunFiles(directory / "runs"),
        max_resident_adapter_bytes=adapter_bytes,
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
