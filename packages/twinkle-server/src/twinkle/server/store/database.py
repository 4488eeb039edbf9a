"""Every query there is, as methods on typed rows. Blocking: callers on an event loop use a thread."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine, event, func, or_, select
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import sessionmaker

from twinkle.protocol.uris import CheckpointUri
from twinkle.server.store.tables import UNNAMED_PREFIX, Base, Checkpoint, Run, Sampler, Session


class Database:
    """Rows of sessions, runs, checkpoints and samplers. Every look-up names the tenant: others' rows don't exist."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: any SQLAlchemy URL; tables that are missing are made.
        """
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _tune_sqlite)
        Base.metadata.create_all(self._engine)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def _transaction(self) -> Generator[OrmSession]:
        with self._sessions.begin() as session:
            yield session

    def put(self, row: Session | Run | Sampler | Checkpoint) -> None:
        """Write a row, in place of one with the same key."""
        with self._transaction() as session:
            session.merge(row)

    # ------------------------------------------------------------ sessions and samplers

    def session(self, tenant: str, session_id: str) -> Session | None:
        with self._transaction() as session:
            row = session.get(Session, session_id)
            return row if row is not None and row.tenant == tenant else None

    def sampler(self, tenant: str, sampler_id: str) -> Sampler | None:
        with self._transaction() as session:
            row = session.get(Sampler, sampler_id)
            return row if row is not None and row.tenant == tenant else None

    # ------------------------------------------------------------ runs

    def run(self, tenant: str, run_id: str) -> Run | None:
        with self._transaction() as session:
            row = session.get(Run, run_id)
            return row if row is not None and row.tenant == tenant else None

    def runs(self, tenant: str, limit: int, offset: int) -> tuple[list[Run], int]:
        """A page of runs, newest first, and how many there are in all."""
        mine = Run.tenant == tenant
        with self._transaction() as session:
            query = (
                select(Run).where(mine).order_by(Run.created_at.desc(), Run.id).limit(limit).offset(offset)
            )
            total = session.scalar(select(func.count()).select_from(Run).where(mine))
            return list(session.scalars(query)), total or 0

    # ------------------------------------------------------------ checkpoints

    def checkpoint(self, tenant: str, uri: CheckpointUri, now: float) -> Checkpoint | None:
        """The checkpoint of that name that is not expired; in the bare form the tenant's newest."""
        query = select(Checkpoint).where(
            Checkpoint.tenant == tenant,
            Checkpoint.name == uri.name,
            or_(Checkpoint.expires_at.is_(None), Checkpoint.expires_at > now),
        )
        if uri.run_id is not None:
            query = query.where(Checkpoint.run_id == uri.run_id, Checkpoint.kind == uri.kind)
        with self._transaction() as session:
            return session.scalars(query.order_by(Checkpoint.created_at.desc()).limit(1)).first()

    def checkpoints(
        self, tenant: str, now: float, run_id: str | None = None, limit: int = 1000, offset: int = 0
    ) -> tuple[list[Checkpoint], int]:
        """A page of checkpoints, newest first, and how many there are in all."""
        conditions = [
            Checkpoint.tenant == tenant,
            ~Checkpoint.name.startswith(UNNAMED_PREFIX, autoescape=True),
            or_(Checkpoint.expires_at.is_(None), Checkpoint.expires_at > now),
        ]
        if run_id is not None:
            conditions.append(Checkpoint.run_id == run_id)
        with self._transaction() as session:
            query = (
                select(Checkpoint).where(*conditions).order_by(Checkpoint.created_at.desc(), Checkpoint.name)
            )
            total = session.scalar(select(func.count()).select_from(Checkpoint).where(*conditions))
            return list(session.scalars(query.limit(limit).offset(offset))), total or 0

    def unnamed_checkpoints(self, tenant: str, run_id: str) -> list[Checkpoint]:
        """A run's unnamed sampler snapshots."""
        with self._transaction() as session:
            query = select(Checkpoint).where(
                Checkpoint.tenant == tenant,
                Checkpoint.run_id == run_id,
                Checkpoint.name.startswith(UNNAMED_PREFIX, autoescape=True),
            )
            return list(session.scalars(query))

    def delete_checkpoint(self, tenant: str, uri: CheckpointUri) -> bool:
        """Whether there was one."""
        with self._transaction() as session:
            row = session.get(Checkpoint, (uri.run_id, uri.kind, uri.name))
            if row is None or row.tenant != tenant:
                return False
            session.delete(row)
            return True

    def close(self) -> None:
        self._engine.dispose()


def _tune_sqlite(connection: object, _record: object) -> None:
    # Write-ahead logging lets readers go on during a write; a second server on the same file waits its turn.
    cursor = connection.cursor()  # pyright: ignore
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
