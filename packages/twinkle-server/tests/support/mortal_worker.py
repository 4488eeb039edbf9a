"""A worker on the fake backend that can lose its "process", and a service in front of it that copies its runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fake_service import make_config

from twinkle.protocol.errors import ServerFault
from twinkle.server.app import build_parts
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import AdamStep, AdapterState, ModelConfig, Row
from twinkle.server.engine.worker import LocalSampler, LocalWorker, Trained, WorkerLost
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.service.service import Service
from twinkle.server.store.files import LocalFiles
from twinkle.server.store.journal import Journal
from twinkle.server.store.run_files import RunFiles


def never(_method: str, _args: tuple[Any, ...]) -> bool:
    return False


class MortalWorker(LocalWorker):
    """A `LocalWorker` whose backend and sampler are gone after `die`, until `restart` makes new ones.

    Attributes:
        kills: asked before each call whether it is the one that ends the process.
        hangs: asked after each training call, and before each sample, whether it is one that never returns.
        note_after: told of each training call that has been answered.
        may_restart: cleared, it holds a restart up.
        restart_fails: a restart raises this.
    """

    def __init__(self) -> None:
        super().__init__(FakeBackend(ModelConfig(Path("fake"))), FakeEngine())
        self.kills: Callable[[str, tuple[Any, ...]], bool] = never
        self.hangs: Callable[[str], bool] = lambda _method: False
        self.note_after: Callable[[str], None] = lambda _method: None
        self.may_restart = asyncio.Event()
        self.may_restart.set()
        self.restart_fails: Exception | None = None
        self.restarts = 0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._loss: asyncio.Future[WorkerLost] = asyncio.get_running_loop().create_future()
        self._back = asyncio.Event()
        self._is_given_up = False

    def die(self, reason: str = "rank 0") -> None:
        if not self._loss.done():
            self._loss.set_result(WorkerLost(reason))

    async def lost(self) -> WorkerLost:
        return await asyncio.shield(self._loss)

    async def available(self) -> None:
        if self._loss.done():
            await self._back.wait()
        if self._is_given_up:
            raise ServerFault("it could not be restarted")

    def give_up(self) -> None:
        self._is_given_up = True
        self._back.set()

    async def restart(self) -> None:
        await self.may_restart.wait()
        if self.restart_fails is not None:
            raise self.restart_fails
        self.restarts += 1
        self._backend = FakeBackend(ModelConfig(Path("fake")))
        self._sampler_or_none = LocalSampler(FakeEngine())
        self._loss = asyncio.get_running_loop().create_future()
        self._back.set()

    async def close(self) -> None:
        if not self._loss.done():
            await super().close()

    def _note(self, method: str, *args: Any) -> None:
        """A call arrives."""
        self.calls.append((method, args))
        if self.kills(method, args):
            self.die()
        if self._loss.done():
            raise self._loss.result()

    async def _on_training_thread(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._note(method.__name__, *args)
        result = await super()._on_training_thread(method, *args, **kwargs)
        self.note_after(method.__name__)
        if self.hangs(method.__name__):
            await asyncio.Event().wait()
        return result

    async def train(self, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]) -> Trained:
        """As two calls, so that either can be the one that ends the process."""
        results = await self.forward_backward(micro_batches)
        try:
            return results, await self.optim_step(steps)
        except WorkerLost:
            raise
        except Exception:
            return results, None

    async def generate(self, request: GenerateRequest) -> Any:
        self._note("generate", request)
        if self.hangs("generate"):
            await asyncio.Event().wait()
        return await super().generate(request)

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        self._note("add_sampler_adapter", sampler_adapter_id, state)
        await super().add_sampler_adapter(sampler_adapter_id, state)

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        self._note("remove_sampler_adapter", sampler_adapter_id)
        await super().remove_sampler_adapter(sampler_adapter_id)


def make_mortal_service(
    directory: Path,
    worker: LocalWorker,
    snapshot_seconds: float,
    adapter_bytes: int | None = None,
    journal: Callable[[], Journal] | None = None,
    database_url: str | None = None,
    engine: str | None = None,
) -> Service:
    parts = build_parts(
        make_config(directory, adapter_bytes=adapter_bytes, database_url=database_url),
        worker,
        RunFiles(LocalFiles(directory / "runs")),
        snapshot_seconds=snapshot_seconds,
        open_journal=journal,
        live_files=lambda other: RunFiles(LocalFiles(other / "runs")),
        engine=engine,
    )
    return Service(parts)
