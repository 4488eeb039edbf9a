"""Queries about training runs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, or_, select, tuple_, update
from sqlalchemy.orm import Session as OrmSession

from twinkle.protocol.uris import CheckpointUri
from twinkle.server.store.connection import Connection, again_if_taken
from twinkle.server.store.tables import UNNAMED_PREFIX, Checkpoint, Run, Session, belongs_to

# A checkpoint is newer than the one before it by at least this many seconds.
_NEWER = 1e-6


@dataclass(frozen=True)
class StorageTotal:
    """The checkpoints of a tenant's project."""

    project_id: str | None
    count: int
    size_bytes: int
    tenant: str


class CheckpointRows(Connection):
    def run(self, tenant: str, run_id: str, now: float, accessible: bool = False) -> Run | None:
        """A run; with `accessible` also another tenant's if it has a published checkpoint."""
        with self.transaction() as session:
            row = session.get(Run, run_id)
            if row is None or row.tenant == tenant:
                return row
            published = select(Checkpoint.run_id).where(
                Checkpoint.run_id == run_id, Checkpoint.public, _not_expired(now)
            )
            return row if accessible and session.scalar(published.limit(1)) else None

    def runs(
        self, tenant: str, now: float, limit: int, offset: int, accessible: bool, project_id: str | None
    ) -> tuple[list[Run], int]:
        """A page of runs, newest first, and the total number; with `accessible` also others' runs that have a published
        checkpoint.
        """
        wanted = Run.tenant == tenant
        if accessible:
            published = select(Checkpoint.run_id).where(Checkpoint.public, _not_expired(now))
            wanted = or_(wanted, Run.id.in_(published))
        conditions: list[ColumnElement[bool]] = [wanted]
        if project_id is not None:
            conditions.append(Run.session_id.in_(select(Session.id).where(Session.project_id == project_id)))
        with self.transaction() as session:
            query = select(Run).where(*conditions).order_by(Run.created_at.desc(), Run.id)
            total = session.scalar(select(func.count()).select_from(Run).where(*conditions))
            return list(session.scalars(query.limit(limit).offset(offset))), total or 0

    # ------------------------------------------------------------ checkpoints

    def put_checkpoint(self, row: Checkpoint) -> None:
        """Write a row, replacing one of the same name, as the tenant's newest: what was saved last counts, and its time
        distinguishes it from what it overwrites, even if the clock has gone back in between.
        """
        newest = select(func.max(Checkpoint.created_at)).where(Checkpoint.tenant == row.tenant)

        def put() -> None:
            with self.transaction() as session:
                _one_at_a_time(session, row.tenant)
                before = session.scalar(newest)
                if before is not None:
                    row.created_at = max(row.created_at, before + _NEWER)
                session.merge(row)

        again_if_taken(put)

    def checkpoint(
        self, tenant: str, uri: CheckpointUri, now: float, or_public: bool = False
    ) -> Checkpoint | None:
        """The unexpired checkpoint of that name; for a bare name the tenant's newest.

        Args:
            or_public: a full name also finds what another tenant has published.
        """
        mine: ColumnElement[bool] = Checkpoint.tenant == tenant
        if or_public and uri.run_id is not None:
            mine = or_(mine, Checkpoint.public)
        query = select(Checkpoint).where(mine, Checkpoint.name == uri.name, _not_expired(now))
        if uri.run_id is not None:
            query = query.where(Checkpoint.run_id == uri.run_id, Checkpoint.kind == uri.kind)
        with self.transaction() as session:
            return session.scalars(query.order_by(Checkpoint.created_at.desc()).limit(1)).first()

    def checkpoint_row(self, uri: CheckpointUri) -> Checkpoint | None:
        """The row of a full name, of any tenant and age."""
        with self.transaction() as session:
            return session.get(Checkpoint, (uri.run_id, uri.kind, uri.name))

    def checkpoints(
        self,
        tenant: str,
        now: float,
        run_id: str | None = None,
        limit: int = 1000,
        offset: int = 0,
        or_public: bool = False,
    ) -> tuple[list[Checkpoint], int]:
        """A page of checkpoints, newest first, and the total number.

        Args:
            or_public: also those that another tenant has published.
        """
        mine: ColumnElement[bool] = Checkpoint.tenant == tenant
        conditions = [or_(mine, Checkpoint.public) if or_public else mine, *_listed(now)]
        if run_id is not None:
            conditions.append(Checkpoint.run_id == run_id)
        with self.transaction() as session:
            query = (
                select(Checkpoint).where(*conditions).order_by(Checkpoint.created_at.desc(), Checkpoint.name)
            )
            total = session.scalar(select(func.count()).select_from(Checkpoint).where(*conditions))
            return list(session.scalars(query.limit(limit).offset(offset))), total or 0

    def newest_checkpoints(self, tenant: str, run_ids: Sequence[str], now: float) -> list[Checkpoint]:
        """The newest checkpoint of each run and kind that the tenant may see."""
        seen = [or_(Checkpoint.tenant == tenant, Checkpoint.public), *_listed(now)]
        newest = (
            select(Checkpoint.run_id, Checkpoint.kind, func.max(Checkpoint.created_at))
            .where(Checkpoint.run_id.in_(run_ids), *seen)
            .group_by(Checkpoint.run_id, Checkpoint.kind)
        )
        key = tuple_(Checkpoint.run_id, Checkpoint.kind, Checkpoint.created_at)
        with self.transaction() as session:
            return list(session.scalars(select(Checkpoint).where(key.in_(newest), *seen)))

    def unnamed_checkpoints(self, tenant: str, run_id: str) -> list[Checkpoint]:
        """A run's ephemeral sampler weights."""
        with self.transaction() as session:
            query = select(Checkpoint).where(
                Checkpoint.tenant == tenant,
                Checkpoint.run_id == run_id,
                Checkpoint.name.startswith(UNNAMED_PREFIX, autoescape=True),
            )
            return list(session.scalars(query))

    def expired_checkpoints(self, now: float, limit: int) -> list[Checkpoint]:
        """Expired checkpoints of all tenants."""
        with self.transaction() as session:
            query = select(Checkpoint).where(Checkpoint.expires_at <= now).order_by(Checkpoint.expires_at)
            return list(session.scalars(query.limit(limit)))

    def set_public(self, tenant: str, uri: CheckpointUri, public: bool) -> None:
        with self.transaction() as session:
            session.execute(update(Checkpoint).where(*_own(tenant, uri)).values(public=public))

    def set_expiry(self, tenant: str, uri: CheckpointUri, expires_at: float | None) -> None:
        with self.transaction() as session:
            session.execute(update(Checkpoint).where(*_own(tenant, uri)).values(expires_at=expires_at))

    def delete_checkpoint(self, tenant: str, uri: CheckpointUri) -> bool:
        """Returns whether there was one."""
        with self.transaction() as session:
            row = session.get(Checkpoint, (uri.run_id, uri.kind, uri.name))
            if row is None or row.tenant != tenant:
                return False
            session.delete(row)
            return True

    # ------------------------------------------------------------ totals

    def checkpoint_totals(self, session_ids: Sequence[str], now: float) -> dict[str, tuple[int, int]]:
        """Number and bytes of the checkpoints made in each session."""
        query = (
            select(Run.session_id, func.count(), func.sum(Checkpoint.size_bytes))
            .join(Checkpoint, Checkpoint.run_id == Run.id)
            .where(Run.session_id.in_(session_ids), *_listed(now))
            .group_by(Run.session_id)
        )
        with self.transaction() as session:
            return {row[0]: (row[1], int(row[2] or 0)) for row in session.execute(query)}

    def storage(self, tenant: str, now: float, project_id: str | None) -> list[StorageTotal]:
        """The current checkpoints, by tenant and project."""
        query = (
            select(Session.project_id, func.count(), func.sum(Checkpoint.size_bytes), Checkpoint.tenant)
            .join(Run, Run.session_id == Session.id)
            .join(Checkpoint, Checkpoint.run_id == Run.id)
            .where(belongs_to(tenant, Checkpoint.tenant), *_listed(now))
            .group_by(Checkpoint.tenant, Session.project_id)
        )
        if project_id is not None:
            query = query.where(Session.project_id == project_id)
        with self.transaction() as session:
            return [StorageTotal(row[0], row[1], int(row[2] or 0), row[3]) for row in session.execute(query)]

    def checkpoint_total(
        self, tenant: str, now: float, besides: Sequence[CheckpointUri] = ()
    ) -> StorageTotal:
        """Number and bytes of named checkpoints: a tenant's, or `EVERYBODY`'s.

        Args:
            besides: not counted.
        """
        key = tuple_(Checkpoint.run_id, Checkpoint.kind, Checkpoint.name)
        query = select(func.count(), func.sum(Checkpoint.size_bytes))
        query = query.where(belongs_to(tenant, Checkpoint.tenant), *_listed(now))
        if besides:
            query = query.where(key.not_in([(uri.run_id, uri.kind, uri.name) for uri in besides]))
        with self.transaction() as session:
            count, size = session.execute(query).one()
            return StorageTotal(None, count, int(size or 0), tenant)


def _one_at_a_time(session: OrmSession, tenant: str) -> None:
    """Wait until no other transaction adds a checkpoint of the tenant: each would find the same newest one."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"twinkle-checkpoints {tenant}"))))


def _not_expired(now: float) -> ColumnElement[bool]:
    return or_(Checkpoint.expires_at.is_(None), Checkpoint.expires_at > now)


def _listed(now: float) -> list[ColumnElement[bool]]:
    """Conditions of checkpoints that lists show."""
    return [~Checkpoint.name.startswith(UNNAMED_PREFIX, autoescape=True), _not_expired(now)]


def _own(tenant: str, uri: CheckpointUri) -> list[ColumnElement[bool]]:
    return [
        Checkpoint.tenant == tenant,
        Checkpoint.run_id == uri.run_id,
        Checkpoint.kind == uri.kind,
        Checkpoint.name == uri.name,
    ]
