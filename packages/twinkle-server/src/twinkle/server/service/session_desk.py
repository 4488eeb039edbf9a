"""Sessions and what becomes of their runs: finished by their clients, or let go of when those have vanished."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeAlias

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Unavailable
from twinkle.server.checkpoints.checkpoints import Checkpoints
from twinkle.server.config import LimitsSection
from twinkle.server.engine.samples import SampleRunner
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.live_runs import LiveRuns
from twinkle.server.scheduling.records import as_computed
from twinkle.server.scheduling.runs import Run
from twinkle.server.scheduling.threads import TenantThreads
from twinkle.server.service import sessions
from twinkle.server.service.losses import CustomLosses
from twinkle.server.service.presence import Presence
from twinkle.server.service.sampling_sessions import Samplers
from twinkle.server.service.session_search import ACTIVE_SECONDS, search
from twinkle.server.store import tables
from twinkle.server.store.database import Database

# Samples that were stopped because their client was away fail when it has been for so long.
_GIVE_UP_SECONDS = 900.0

log = logging.getLogger("twinkle.server")

# Of what a client says about the end of a session; the rest is cut off.
_MAX_DETAIL = 4096

SessionQuery: TypeAlias = (
    m.CreateSessionRequest
    | m.SessionHeartbeatRequest
    | m.FinishSessionRequest
    | m.ListSessions
    | m.GetSession
    | m.SearchSessions
    | m.AssignSessionProject
    | m.ExportTrace
)


class SessionDesk:
    """Answers what is asked of sessions, and knows when each was last heard of. Single-threaded.

    A session whose client has vanished costs no computation: what was accepted on its runs is done, and its samples are
    stopped. After `idle_seconds` its runs are saved as checkpoints and end, so that they take no memory either.
    """

    def __init__(
        self,
        database: Database,
        live: LiveRuns,
        futures: FutureTable,
        checkpoints: Checkpoints,
        samples: SampleRunner,
        samplers: Samplers,
        losses: CustomLosses,
        presence: Presence,
        limits: LimitsSection,
        threads: TenantThreads,
    ) -> None:
        """
        Args:
            threads: for what tenants ask.
        """
        self._database = database
        self._live = live
        self._futures = futures
        self._checkpoints = checkpoints
        self._samples = samples
        self._samplers = samplers
        self._losses = losses
        self._presence = presence
        self._limits = limits
        self._idle_seconds = limits.max_session_idle_seconds
        self._threads = threads
        # Of the monotonic clock: one that is set anew must not make clients look as if they had vanished.
        self._last_seen: dict[str, float] = {}

    def heard_of(self, session_id: str, heartbeat: bool = False) -> None:
        """Its client has asked for something."""
        self._last_seen[session_id] = time.monotonic()
        self._presence.heard_of(session_id, heartbeat)
        self._samples.resume(session_id)

    @contextmanager
    def waiting(self, session_id: str | None) -> Generator[None]:
        """Its client waits for a result while the block runs; None is of no session that is known."""
        if session_id is not None:
            self._last_seen[session_id] = time.monotonic()
            self._samples.resume(session_id)
        with self._presence.waiting(session_id):
            yield

    def expect(self, session_id: str) -> None:
        """Its client was there when an earlier process was."""
        self._last_seen[session_id] = time.monotonic()
        self._presence.expect(session_id)

    async def answer(self, tenant: str, query: SessionQuery) -> m.Reply:
        """
        Raises:
            InvalidRequest, NotFound, Gone: as fits.
        """
        match query:
            case m.CreateSessionRequest():
                reply = await self.create(tenant, query)
                self.heard_of(reply.session_id)
                return reply
            case m.SessionHeartbeatRequest():
                row = await sessions.find_open(self._database, tenant, query.session_id)
                self.heard_of(row.id, heartbeat=True)
                return m.SessionHeartbeatResponse()
            case m.FinishSessionRequest():
                return await self._finish(tenant, query)
            case m.ListSessions():
                return await self._threads.run(tenant, lambda: sessions.listed(self._database, tenant, query))
            case m.GetSession():
                return await self._threads.run(tenant, lambda: sessions.info(self._database, tenant, query))
            case m.SearchSessions():
                active = self._active()
                return await self._threads.run(tenant, lambda: search(self._database, tenant, query, active))
            case m.AssignSessionProject():
                return await self._assign_project(tenant, query)
            case m.ExportTrace():
                await sessions.find(self._database, tenant, query.session_id)
                return m.TraceExport(status="failed", error="this server records no traces of sessions")

    async def create(self, tenant: str, request: m.CreateSessionRequest) -> m.CreateSessionResponse:
        """
        Raises:
            InvalidRequest: if its metadata is too long.
            QuotaReached: if it would be a session too many.
        """
        known = set(self._last_seen)
        return await asyncio.to_thread(sessions.create, self._database, tenant, request, self._limits, known)

    def _active(self) -> set[str]:
        since = time.monotonic() - ACTIVE_SECONDS
        return {session_id for session_id, moment in self._last_seen.items() if moment > since}

    async def _assign_project(self, tenant: str, query: m.AssignSessionProject) -> m.Acknowledged:
        row = await sessions.find(self._database, tenant, query.session_id)
        await asyncio.to_thread(self._database.set_project, tenant, row.id, query.project_id)
        details = {"session_id": row.id, "project_id": query.project_id}
        entry = tables.Audit(tenant=tenant, time=time.time(), event="project_session_assign", details=details)
        await asyncio.to_thread(self._database.put, entry)
        return m.Acknowledged()

    async def _finish(self, tenant: str, request: m.FinishSessionRequest) -> m.Acknowledged:
        session = await sessions.find(self._database, tenant, request.session_id)
        self._samples.resume(session.id)  # whoever ends it is there, and nothing is known of it from then on
        await asyncio.to_thread(
            self._database.finish_session,
            tenant,
            session.id,
            time.time(),
            request.reason.type,
            request.detail and request.detail[:_MAX_DETAIL],
        )
        for run in self._runs_of(session.id):
            await self._unload(run)
        self._forget(session.id)
        return m.Acknowledged()

    def _runs_of(self, session_id: str) -> list[Run]:
        return [run for run in self._live if run.session_id == session_id]

    async def _unload(self, run: Run) -> None:
        await self._do_last(run, m.UnloadModelRequest(model_id=run.run_id))
        await self._checkpoints.drop_unnamed(run)

    async def _do_last(
        self, run: Run, request: m.SaveWeightsRequest | m.UnloadModelRequest
    ) -> m.Result | m.Failure:
        promise = self._live.enqueue_last(run, request)
        while (outcome := await self._futures.wait(run.tenant, promise.request_id, 60.0)) is None:
            pass
        return as_computed(outcome)

    def _forget(self, session_id: str) -> None:
        self._last_seen.pop(session_id, None)
        self._samplers.forget(session_id)
        self._losses.forget(session_id)
        self._presence.forget(session_id)
        self._live.forget_lost(session_id)

    # ------------------------------------------------------------ clients that have vanished

    def pause_gone(self) -> None:
        """Stop the samples of clients that are not there any more; nobody waits for them.

        What was accepted stays promised: a client that comes back has them drawn again. (Passes and steps are done
        anyway: they are what a run is.)
        """
        self._presence.look()
        for session_id in self._samples.sessions():
            if self._presence.is_gone(session_id):
                self._samples.pause(session_id)
            if self._presence.silent_for(session_id) >= _GIVE_UP_SECONDS:
                self._samples.give_up(session_id)

    async def release_vanished(self) -> None:
        """Let go of the sessions that nobody has been heard of for long."""
        if self._idle_seconds is None:
            return
        for run in self._live:  # of an earlier process: it is counted from now
            self._last_seen.setdefault(run.session_id, time.monotonic())
        since = time.monotonic() - self._idle_seconds
        for session_id in [name for name, moment in self._last_seen.items() if moment <= since]:
            await self._release(session_id, since)

    async def _release(self, session_id: str, since: float) -> None:
        self._samples.cancel_all(session_id)
        for run in self._runs_of(session_id):
            if self._last_seen.get(session_id, 0.0) > since:
                return  # it has come back
            saved = await self._save(run)
            if isinstance(saved, m.Failure):  # it stays as it is, and is tried again
                log.warning(
                    "run %s of a client that has vanished could not be saved: %s", run.run_id, saved.error
                )
                return
            await self._unload(run)
            log.info("run %s of a client that has vanished is kept as %s", run.run_id, tables.RELEASED_NAME)
        self._forget(session_id)

    async def _save(self, run: Run) -> m.Result | m.Failure:
        request = m.SaveWeightsRequest(
            model_id=run.run_id, seq_id=0, path=tables.RELEASED_NAME, overwrite=True
        )
        try:
            return await self._do_last(run, request)
        except Unavailable as error:
            return m.Failure(error=error.message, category=error.category)
