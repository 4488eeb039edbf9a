"""Queries about sessions, their sampling sessions and custom losses."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from sqlalchemy import delete, func, or_, select, tuple_, update

from twinkle.server.store.connection import Connection
from twinkle.server.store.session_filter import COLUMNS, FoundSession, SessionFilter
from twinkle.server.store.tables import CustomLoss, Run, SamplingSession, Session, belongs_to

# Sessions.
_DELETED_AT_ONCE = 100


class SessionRows(Connection):
    def session(self, tenant: str, session_id: str) -> Session | None:
        with self.transaction() as session:
            row = session.get(Session, session_id)
            return row if row is not None and row.tenant == tenant else None

    def session_ids(
        self, tenant: str, limit: int, offset: int = 0, project_id: str | None = None
    ) -> list[str]:
        """A page of sessions, newest first."""
        query = select(Session.id).where(Session.tenant == tenant)
        if project_id is not None:
            query = query.where(Session.project_id == project_id)
        query = query.order_by(Session.created_at.desc(), Session.id.desc()).limit(limit).offset(offset)
        with self.transaction() as session:
            return list(session.scalars(query))

    def find_sessions(
        self, tenant: str, wanted: SessionFilter, limit: int, before: tuple[float, str] | None = None
    ) -> list[FoundSession]:
        """A page of the sessions that fulfil what the database can check, newest first.

        Args:
            before: only those older than (time of creation, id).
        """
        query = select(*COLUMNS).where(Session.tenant == tenant, *wanted.conditions())
        if before is not None:
            query = query.where(tuple_(Session.created_at, Session.id) < before)
        query = query.order_by(Session.created_at.desc(), Session.id.desc()).limit(limit)
        with self.transaction() as session:
            return [FoundSession(*row) for row in session.execute(query)]

    def count_sessions(self, tenant: str, open_since: float | None = None) -> int:
        """
        Args:
            open_since: only unfinished ones begun since then.
        """
        query = select(func.count()).select_from(Session).where(Session.tenant == tenant)
        if open_since is not None:
            query = query.where(Session.created_at >= open_since, Session.finished_at.is_(None))
        with self.transaction() as session:
            return session.scalar(query) or 0

    def delete_empty_sessions(self, tenant: str, since: float, besides: AbstractSet[str]) -> int:
        """Delete some of the oldest sessions that are over and left nothing behind; returns how many.

        Args:
            since: an unfinished session is over if it was begun before.
            besides: these are not over.
        """
        is_over = or_(Session.finished_at.is_not(None), Session.created_at < since)
        left = [
            ~select(other.id).where(other.session_id == Session.id).exists()
            for other in (Run, SamplingSession, CustomLoss)
        ]
        query = select(Session.id).where(Session.tenant == tenant, is_over, *left)
        query = query.order_by(Session.created_at).limit(_DELETED_AT_ONCE + len(besides))
        # Not those to which another process is adding a run.
        query = query.with_for_update(skip_locked=True)
        with self.transaction() as session:
            ids = [name for name in session.scalars(query) if name not in besides][:_DELETED_AT_ONCE]
            # Others may have added a run before they were locked.
            deletion = delete(Session).where(Session.id.in_(ids), *left).returning(Session.id)
            return len(session.scalars(deletion).all())

    def session_metadata(self, tenant: str, session_ids: Sequence[str]) -> dict[str, Session]:
        query = select(Session).where(belongs_to(tenant, Session.tenant), Session.id.in_(session_ids))
        with self.transaction() as session:
            return {row.id: row for row in session.scalars(query)}

    def finish_session(
        self, tenant: str, session_id: str, now: float, reason: str, detail: str | None
    ) -> None:
        """Record how a session ended; the first time counts."""
        change = (
            update(Session)
            .where(Session.tenant == tenant, Session.id == session_id, Session.finished_at.is_(None))
            .values(finished_at=now, finish_reason=reason, finish_detail=detail)
        )
        with self.transaction() as session:
            session.execute(change)

    def set_project(self, tenant: str, session_id: str, project_id: str) -> None:
        change = update(Session).where(Session.tenant == tenant, Session.id == session_id)
        with self.transaction() as session:
            session.execute(change.values(project_id=project_id))

    def run_ids(self, session_id: str) -> list[str]:
        query = select(Run.id).where(Run.session_id == session_id).order_by(Run.created_at, Run.id)
        with self.transaction() as session:
            return list(session.scalars(query))

    def sampler_ids(self, session_id: str) -> list[str]:
        query = select(SamplingSession.id).where(SamplingSession.session_id == session_id)
        with self.transaction() as session:
            return list(session.scalars(query.order_by(SamplingSession.created_at, SamplingSession.id)))

    # ------------------------------------------------------------ samplers and losses

    def sampler(self, tenant: str, sampler_id: str) -> SamplingSession | None:
        with self.transaction() as session:
            row = session.get(SamplingSession, sampler_id)
            return row if row is not None and row.tenant == tenant else None

    def join_sampler(self, tenant: str, sampler_id: str) -> int | None:
        """The number of a sampler's new client, from 1; None if there is no such sampler."""
        mine = (SamplingSession.tenant == tenant, SamplingSession.id == sampler_id)
        with self.transaction() as session:
            session.execute(update(SamplingSession).where(*mine).values(clients=SamplingSession.clients + 1))
            return session.scalar(select(SamplingSession.clients).where(*mine))

    def custom_loss(self, tenant: str, loss_id: str) -> CustomLoss | None:
        with self.transaction() as session:
            row = session.get(CustomLoss, loss_id)
            return row if row is not None and row.tenant == tenant else None
