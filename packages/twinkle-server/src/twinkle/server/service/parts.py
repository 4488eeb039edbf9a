"""The objects of one engine, which `app` builds and the verbs and queries work on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from twinkle.protocol import messages as m
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.config import LimitsSection
from twinkle.server.engine.compaction import Compaction
from twinkle.server.engine.completions import CompletionLog
from twinkle.server.engine.engine import Engine
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.samples import SampleRunner
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.leases import Leases
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import RunLog
from twinkle.server.scheduling.runs import Received
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.scheduling.threads import Threads
from twinkle.server.service.downloads import Downloads
from twinkle.server.service.losses import CustomLosses
from twinkle.server.store.database import Database
from twinkle.server.store.journal import Journal
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.run_files import RunFiles
from twinkle.server.store.sampler_cache import SamplerCache

Q = TypeVar("Q")


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """
    Attributes:
        model_name: the base model's plain name.
        tokens: the rate limit on tokens.
        open_journal: blocking; None: runs end with this process.
        live_files: the snapshots of the live runs that an engine's directory stands for; None as above.
    """

    model_name: str
    limits: LimitsSection
    worker: WorkerPort
    database: Database
    ledger: Ledger
    downloads: Downloads
    threads: Threads = field(default_factory=Threads)
    tokens: RateLimit
    futures: FutureTable
    scheduler: Scheduler
    leases: Leases
    live: LiveRuns
    run_log: RunLog
    compaction: Compaction
    snapshots: Snapshots
    residency: Residency
    checkpoints: Checkpoints
    samples: SampleRunner
    completions: CompletionLog
    samplers: SamplerCache
    losses: CustomLosses
    engine: Engine
    run_files: RunFiles
    open_journal: Callable[[], Journal] | None
    live_files: Callable[[Path], RunFiles] | None


Submit: TypeAlias = Callable[[Parts, str, Any, Received], Awaitable[m.Promise]]
"""Accepts one type of operation; called with the tenant, the request, and the request as it was received."""

Answer: TypeAlias = Callable[[Parts, str, Any], Awaitable[m.Reply]]
"""Answers one type of query; called with the tenant and the query."""


def reads(function: Callable[[Database, str, Q], m.Reply]) -> Answer:
    """An answer that only reads rows, on one of the threads for queries; pending usage is written first."""

    async def answer(parts: Parts, tenant: str, query: Q) -> m.Reply:
        await parts.ledger.flush()
        return await parts.threads.queries.run(tenant, lambda: function(parts.database, tenant, query))

    return answer
