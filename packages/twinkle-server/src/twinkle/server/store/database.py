"""Every query there is, as methods on typed rows. Blocking: callers on an event loop use a thread."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import (
    ColumnElement,
    Engine,
    create_engine,
    delete,
    event,
    func,
    inspect,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstrumentedAttribute, sessionmaker
from sqlalchemy.orm import Session as OrmSession

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.store.private import private_file, tighten_if_there
from twinkle.server.store.session_filter import COLUMNS, FoundSession, SessionFilter
from twinkle.server.store.sqlite_file import SqliteFile, check_not_lost
from twinkle.server.store.tables import (
    EVERYBODY,
    UNNAMED_PREFIX,
    ApiKey,
    Audit,
    Base,
    Checkpoint,
    CustomLoss,
    Run,
    SamplingSession,
    Session,
    Usage,
)

# By how many seconds a checkpoint is newer than the one before it, at least.
_NEWER = 1e-6
# Sessions.
_DELETED_AT_ONCE = 100


@dataclass(frozen=True)
class StorageTotal:
    """The checkpoints of a tenant's project."""

    project_id: str | None
    count: int
    size_bytes: int
    tenant: str


class Database:
    """Rows of sessions, runs, checkpoints and samplers. Every look-up names the tenant: others' rows don't exist,
    unless a method says that it also finds what they have published.
    """

    def __init__(self, url: str) -> None:
        """
        Args:
            url: any SQLAlchemy URL; tables that are missing are made.

        Raises:
            InvalidRequest: if its tables are those of another version, or it can't be used at all.
        """
        self._engine = create_engine(url)
        self._file: SqliteFile | None = None
        path = _path_of(self._engine)
        if path is not None:
            check_not_lost(path)
            _make_private(path)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _tune_sqlite)
        try:
            _check_tables(self._engine)
            Base.metadata.create_all(self._engine)
        except DBAPIError as error:
            self._engine.dispose()
            raise _unusable(self._engine, error) from error
        if path is not None:
            self._file = SqliteFile(path)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def _transaction(self) -> Generator[OrmSession]:
        """
        Raises:
            DatabaseGone: if the file that was opened is not there just now.
        """
        if self._file is not None:
            self._file.check()
        with self._sessions.begin() as session:
            yield session

    def put(self, row: Session | Run | SamplingSession | CustomLoss | Audit) -> None:
        """Write a row, in place of one with the same key."""
        with self._transaction() as session:
            session.merge(row)

    # ------------------------------------------------------------ sessions

    def session(self, tenant: str, session_id: str) -> Session | None:
        with self._transaction() as session:
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
        with self._transaction() as session:
            return list(session.scalars(query))

    def find_sessions(
        self, tenant: str, wanted: SessionFilter, limit: int, before: tuple[float, str] | None = None
    ) -> list[FoundSession]:
        """A page of the sessions that fulfil what the database can tell, newest first.

        Args:
            before: only those older than (time of creation, id).
        """
        query = select(*COLUMNS).where(Session.tenant == tenant, *wanted.conditions())
        if before is not None:
            query = query.where(tuple_(Session.created_at, Session.id) < before)
        query = query.order_by(Session.created_at.desc(), Session.id.desc()).limit(limit)
        with self._transaction() as session:
            return [FoundSession(*row) for row in session.execute(query)]

    def count_sessions(self, tenant: str, open_since: float | None = None) -> int:
        """
        Args:
            open_since: only those that were begun since then and are not finished.
        """
        query = select(func.count()).select_from(Session).where(Session.tenant == tenant)
        if open_since is not None:
            query = query.where(Session.created_at >= open_since, Session.finished_at.is_(None))
        with self._transaction() as session:
            return session.scalar(query) or 0

    def delete_empty_sessions(self, tenant: str, since: float, besides: AbstractSet[str]) -> int:
        """Delete some of the oldest sessions that are over and left nothing behind; returns how many.

        Args:
            since: one that isn't finished is over if it was begun before.
            besides: these are not over.
        """
        is_over = or_(Session.finished_at.is_not(None), Session.created_at < since)
        left = [
            ~select(other.id).where(other.session_id == Session.id).exists()
            for other in (Run, SamplingSession, CustomLoss)
        ]
        query = select(Session.id).where(Session.tenant == tenant, is_over, *left)
        query = query.order_by(Session.created_at).limit(_DELETED_AT_ONCE + len(besides))
        with self._transaction() as session:
            ids = [name for name in session.scalars(query) if name not in besides][:_DELETED_AT_ONCE]
            session.execute(delete(Session).where(Session.id.in_(ids)))
            return len(ids)

    def session_metadata(self, tenant: str, session_ids: Sequence[str]) -> dict[str, Session]:
        query = select(Session).where(_of(tenant, Session.tenant), Session.id.in_(session_ids))
        with self._transaction() as session:
            return {row.id: row for row in session.scalars(query)}

    def finish_session(
        self, tenant: str, session_id: str, now: float, reason: str, detail: str | None
    ) -> None:
        """Note how a session ended; the first time counts."""
        change = (
            update(Session)
            .where(Session.tenant == tenant, Session.id == session_id, Session.finished_at.is_(None))
            .values(finished_at=now, finish_reason=reason, finish_detail=detail)
        )
        with self._transaction() as session:
            session.execute(change)

    def set_project(self, tenant: str, session_id: str, project_id: str) -> None:
        change = update(Session).where(Session.tenant == tenant, Session.id == session_id)
        with self._transaction() as session:
            session.execute(change.values(project_id=project_id))

    def run_ids(self, session_id: str) -> list[str]:
        query = select(Run.id).where(Run.session_id == session_id).order_by(Run.created_at, Run.id)
        with self._transaction() as session:
            return list(session.scalars(query))

    def sampler_ids(self, session_id: str) -> list[str]:
        query = select(SamplingSession.id).where(SamplingSession.session_id == session_id)
        with self._transaction() as session:
            return list(session.scalars(query.order_by(SamplingSession.created_at, SamplingSession.id)))

    def checkpoint_totals(self, session_ids: Sequence[str], now: float) -> dict[str, tuple[int, int]]:
        """Number and bytes of the checkpoints made in each session."""
        query = (
            select(Run.session_id, func.count(), func.sum(Checkpoint.size_bytes))
            .join(Checkpoint, Checkpoint.run_id == Run.id)
            .where(Run.session_id.in_(session_ids), *_listed(now))
            .group_by(Run.session_id)
        )
        with self._transaction() as session:
            return {row[0]: (row[1], int(row[2] or 0)) for row in session.execute(query)}

    # ------------------------------------------------------------ samplers and losses

    def sampler(self, tenant: str, sampler_id: str) -> SamplingSession | None:
        with self._transaction() as session:
            row = session.get(SamplingSession, sampler_id)
            return row if row is not None and row.tenant == tenant else None

    def join_sampler(self, tenant: str, sampler_id: str) -> int | None:
        """The number of one more client of a sampler, from 1; None if there is no such sampler."""
        mine = (SamplingSession.tenant == tenant, SamplingSession.id == sampler_id)
        with self._transaction() as session:
            session.execute(update(SamplingSession).where(*mine).values(clients=SamplingSession.clients + 1))
            return session.scalar(select(SamplingSession.clients).where(*mine))

    def custom_loss(self, tenant: str, loss_id: str) -> CustomLoss | None:
        with self._transaction() as session:
            row = session.get(CustomLoss, loss_id)
            return row if row is not None and row.tenant == tenant else None

    # ------------------------------------------------------------ runs

    def run(self, tenant: str, run_id: str, now: float, accessible: bool = False) -> Run | None:
        """A run; with `accessible` also another tenant's that has a published checkpoint."""
        with self._transaction() as session:
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
        """A page of runs, newest first, and how many there are in all; with `accessible` also others' runs that have
        a published checkpoint.
        """
        wanted = Run.tenant == tenant
        if accessible:
            published = select(Checkpoint.run_id).where(Checkpoint.public, _not_expired(now))
            wanted = or_(wanted, Run.id.in_(published))
        conditions: list[ColumnElement[bool]] = [wanted]
        if project_id is not None:
            conditions.append(Run.session_id.in_(select(Session.id).where(Session.project_id == project_id)))
        with self._transaction() as session:
            query = select(Run).where(*conditions).order_by(Run.created_at.desc(), Run.id)
            total = session.scalar(select(func.count()).select_from(Run).where(*conditions))
            return list(session.scalars(query.limit(limit).offset(offset))), total or 0

    # ------------------------------------------------------------ checkpoints

    def put_checkpoint(self, row: Checkpoint) -> None:
        """Write a row, in place of one of the same name, as the tenant's newest: what was saved last counts, and its
        time tells it from what it overwrites, also if the clock has gone back in between.
        """
        newest = select(func.max(Checkpoint.created_at)).where(Checkpoint.tenant == row.tenant)
        with self._transaction() as session:
            before = session.scalar(newest)
            if before is not None:
                row.created_at = max(row.created_at, before + _NEWER)
            session.merge(row)

    def checkpoint(
        self, tenant: str, uri: CheckpointUri, now: float, or_public: bool = False
    ) -> Checkpoint | None:
        """The checkpoint of that name that is not expired; in the bare form the tenant's newest.

        Args:
            or_public: a full name also finds what another tenant has published.
        """
        mine: ColumnElement[bool] = Checkpoint.tenant == tenant
        if or_public and uri.run_id is not None:
            mine = or_(mine, Checkpoint.public)
        query = select(Checkpoint).where(mine, Checkpoint.name == uri.name, _not_expired(now))
        if uri.run_id is not None:
            query = query.where(Checkpoint.run_id == uri.run_id, Checkpoint.kind == uri.kind)
        with self._transaction() as session:
            return session.scalars(query.order_by(Checkpoint.created_at.desc()).limit(1)).first()

    def checkpoint_row(self, uri: CheckpointUri) -> Checkpoint | None:
        """The row of a full name, whoever's it is and however old."""
        with self._transaction() as session:
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
        """A page of checkpoints, newest first, and how many there are in all.

        Args:
            or_public: also those that another tenant has published.
        """
        mine: ColumnElement[bool] = Checkpoint.tenant == tenant
        conditions = [or_(mine, Checkpoint.public) if or_public else mine, *_listed(now)]
        if run_id is not None:
            conditions.append(Checkpoint.run_id == run_id)
        with self._transaction() as session:
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
        with self._transaction() as session:
            return list(session.scalars(select(Checkpoint).where(key.in_(newest), *seen)))

    def unnamed_checkpoints(self, tenant: str, run_id: str) -> list[Checkpoint]:
        """A run's unnamed sampler snapshots."""
        with self._transaction() as session:
            query = select(Checkpoint).where(
                Checkpoint.tenant == tenant,
                Checkpoint.run_id == run_id,
                Checkpoint.name.startswith(UNNAMED_PREFIX, autoescape=True),
            )
            return list(session.scalars(query))

    def expired_checkpoints(self, now: float, limit: int) -> list[Checkpoint]:
        """Checkpoints, of all tenants, whose time is over."""
        with self._transaction() as session:
            query = select(Checkpoint).where(Checkpoint.expires_at <= now).order_by(Checkpoint.expires_at)
            return list(session.scalars(query.limit(limit)))

    def set_public(self, tenant: str, uri: CheckpointUri, public: bool) -> None:
        with self._transaction() as session:
            session.execute(update(Checkpoint).where(*_own(tenant, uri)).values(public=public))

    def set_expiry(self, tenant: str, uri: CheckpointUri, expires_at: float | None) -> None:
        with self._transaction() as session:
            session.execute(update(Checkpoint).where(*_own(tenant, uri)).values(expires_at=expires_at))

    def delete_checkpoint(self, tenant: str, uri: CheckpointUri) -> bool:
        """Whether there was one."""
        with self._transaction() as session:
            row = session.get(Checkpoint, (uri.run_id, uri.kind, uri.name))
            if row is None or row.tenant != tenant:
                return False
            session.delete(row)
            return True

    # ------------------------------------------------------------ accounts

    def write_ledger(self, usage: Sequence[Usage], run_times: dict[str, float]) -> None:
        """Add to what was used before, and note when each run was last asked for something."""
        with self._transaction() as session:
            for row in usage:
                key = (row.tenant, row.hour, row.session_id, row.kind)
                known = session.get(Usage, key, with_for_update=True)
                if known is None:
                    session.add(row)
                else:
                    known.count += row.count
            for run_id, time in run_times.items():
                session.execute(update(Run).where(Run.id == run_id).values(last_request_at=time))

    def usage(self, tenant: str, first_hour: int, end_hour: int) -> list[Usage]:
        """By hour, then what there is most of; of a tenant, or of `EVERYBODY`, as `storage` and `audit`."""
        query = select(Usage).where(
            _of(tenant, Usage.tenant), Usage.hour >= first_hour, Usage.hour < end_hour
        )
        with self._transaction() as session:
            return list(session.scalars(query.order_by(Usage.hour, Usage.count.desc(), Usage.kind)))

    def storage(self, tenant: str, now: float, project_id: str | None) -> list[StorageTotal]:
        """The checkpoints that there are now, by tenant and project."""
        query = (
            select(Session.project_id, func.count(), func.sum(Checkpoint.size_bytes), Checkpoint.tenant)
            .join(Run, Run.session_id == Session.id)
            .join(Checkpoint, Checkpoint.run_id == Run.id)
            .where(_of(tenant, Checkpoint.tenant), *_listed(now))
            .group_by(Checkpoint.tenant, Session.project_id)
        )
        if project_id is not None:
            query = query.where(Session.project_id == project_id)
        with self._transaction() as session:
            return [StorageTotal(row[0], row[1], int(row[2] or 0), row[3]) for row in session.execute(query)]

    def checkpoint_total(
        self, tenant: str, now: float, besides: Sequence[CheckpointUri] = ()
    ) -> StorageTotal:
        """How many checkpoints there are with a name, and their bytes: a tenant's, or `EVERYBODY`'s.

        Args:
            besides: are not counted.
        """
        key = tuple_(Checkpoint.run_id, Checkpoint.kind, Checkpoint.name)
        query = select(func.count(), func.sum(Checkpoint.size_bytes))
        query = query.where(_of(tenant, Checkpoint.tenant), *_listed(now))
        if besides:
            query = query.where(key.not_in([(uri.run_id, uri.kind, uri.name) for uri in besides]))
        with self._transaction() as session:
            count, size = session.execute(query).one()
            return StorageTotal(None, count, int(size or 0), tenant)

    def audit(self, tenant: str, start: float, end: float, resource: str | None) -> list[Audit]:
        """Entries of a span of time, oldest first; `resource` is what the event's name begins with."""
        query = select(Audit).where(_of(tenant, Audit.tenant), Audit.time >= start, Audit.time < end)
        if resource is not None:
            query = query.where(Audit.event.startswith(resource, autoescape=True))
        with self._transaction() as session:
            return list(session.scalars(query.order_by(Audit.time, Audit.id)))

    # ------------------------------------------------------------ keys

    def add_key(self, key: ApiKey) -> ApiKey:
        """The row as it was written, with its id."""
        with self._transaction() as session:
            session.add(key)
        return key

    def keys(self, valid_only: bool = False) -> list[ApiKey]:
        """All tenants' keys, oldest first.

        Args:
            valid_only: without those that were revoked.
        """
        query = select(ApiKey).order_by(ApiKey.id)
        if valid_only:
            query = query.where(ApiKey.revoked_at.is_(None))
        with self._transaction() as session:
            return list(session.scalars(query))

    def revoke_key(self, key_id: int, now: float) -> ApiKey | None:
        """The key, revoked now or before; None if there is none with that id."""
        with self._transaction() as session:
            row = session.get(ApiKey, key_id)
            if row is not None and row.revoked_at is None:
                row.revoked_at = now
            return row

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._engine.dispose()


def _not_expired(now: float) -> ColumnElement[bool]:
    return or_(Checkpoint.expires_at.is_(None), Checkpoint.expires_at > now)


def _of(tenant: str, column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    return true() if tenant == EVERYBODY else column == tenant


def _listed(now: float) -> list[ColumnElement[bool]]:
    """Checkpoints that lists show."""
    return [~Checkpoint.name.startswith(UNNAMED_PREFIX, autoescape=True), _not_expired(now)]


def _own(tenant: str, uri: CheckpointUri) -> list[ColumnElement[bool]]:
    return [
        Checkpoint.tenant == tenant,
        Checkpoint.run_id == uri.run_id,
        Checkpoint.kind == uri.kind,
        Checkpoint.name == uri.name,
    ]


def _check_tables(engine: Engine) -> None:
    """
    Raises:
        InvalidRequest: if a table lacks a column that is needed.
    """
    inspector = inspect(engine)
    for table in Base.metadata.sorted_tables:
        if not inspector.has_table(table.name):
            continue
        missing = {column.name for column in table.columns} - {
            column["name"] for column in inspector.get_columns(table.name)
        }
        if missing:
            raise InvalidRequest(
                f"storage: the database at {engine.url.render_as_string()} was made by another version of "
                f"twinkle-server (its table {table.name!r} has no {', '.join(sorted(missing))}); use another "
                "storage.root or database_url, or that version"
            )


def _path_of(engine: Engine) -> Path | None:
    """Of the file of a SQLite database; None if it has none."""
    name = engine.url.database or ":memory:"
    is_file = engine.dialect.name == "sqlite" and name != ":memory:" and not name.startswith("file:")
    return Path(name) if is_file else None


def _unusable(engine: Engine, error: DBAPIError) -> InvalidRequest:
    """What is said where a server can't start on its database."""
    reason = str(error.orig).splitlines()[0][:200]
    path = _path_of(engine)
    if path is None:
        return InvalidRequest(
            f"storage: the database at {engine.url.render_as_string()} can't be used ({reason}); see that it can be "
            "reached, or set another database_url"
        )
    if any(sign in reason for sign in ("not a database", "malformed")):
        return InvalidRequest(
            f"storage: {path} is damaged, or no database of SQLite at all ({reason}); put a backup in its place, or "
            f"move it away, with {path.name}-wal and {path.name}-shm if they are there, to begin with an empty one, "
            "which knows none of the checkpoints"
        )
    return InvalidRequest(
        f"storage: the database {path} can't be used ({reason}); see that this user may write it and its directory, "
        "that there is room, and that no other program holds it, or set another storage.root or database_url"
    )


def _make_private(path: Path) -> None:
    """Keys' hashes and tenants' metadata are for nobody else to read; SQLite's further files get the same mode."""
    if path.parent.is_dir():  # else it can't be used, which is said where it is opened
        with contextlib.suppress(OSError):
            private_file(path)
            for suffix in ("-wal", "-shm"):
                tighten_if_there(Path(f"{path}{suffix}"))


def _tune_sqlite(connection: object, _record: object) -> None:
    # Write-ahead logging lets readers go on during a write; a second server on the same file waits its turn.
    cursor = connection.cursor()  # pyright: ignore
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
