"""The connection to the database: any SQLAlchemy URL. What is special about SQLite's files is here, and about servers
in `database_server`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, event, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import sessionmaker

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.store.database_server import DatabaseServer, make_engine
from twinkle.server.store.private import private_file, tighten_if_there
from twinkle.server.store.sqlite_file import SqliteFile, check_not_lost
from twinkle.server.store.tables import Audit, Base, CustomLoss, Run, SamplingSession, Session

T = TypeVar("T")


class Connection:
    """Blocking, and thread-safe."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: any SQLAlchemy URL; missing tables are created.

        Raises:
            InvalidRequest: if its tables are another version's, or it can't be used at all.
        """
        self._engine = make_engine(url)
        self._file: SqliteFile | None = None
        path = _path_of(self._engine)
        is_sqlite = self._engine.dialect.name == "sqlite"
        self._server = None if is_sqlite else DatabaseServer()
        if path is not None:
            check_not_lost(path)
            _make_private(path)
        if is_sqlite:
            event.listen(self._engine, "connect", _tune_sqlite)
        try:
            _check_tables(self._engine)
            _create_tables(self._engine)
            _move_usage(self._engine)
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
    def transaction(self) -> Generator[OrmSession]:
        """
        Raises:
            DatabaseGone: if the file that was opened is not at its path, or the server can't be reached.
            InvalidRequest: if the server can't hold a value.
        """
        if self._file is not None:
            self._file.check()
        errors = contextlib.nullcontext() if self._server is None else self._server.errors()
        with errors, self._sessions.begin() as session:
            yield session

    def put(self, row: Session | Run | SamplingSession | CustomLoss | Audit) -> None:
        """Write a row, replacing one with the same key."""

        def merge() -> None:
            with self.transaction() as session:
                session.merge(row)

        again_if_taken(merge)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._engine.dispose()


def again_if_taken(write: Callable[[], T]) -> T:
    """The result of a transaction that looks for a row, and adds it if there is none.

    Several processes, or threads, may find none; all but one are refused then, and find it the second time.
    """
    try:
        return write()
    except IntegrityError:
        return write()


def _create_tables(engine: Engine) -> None:
    """Make the tables that are missing; other processes may do so at the same time."""
    try:
        Base.metadata.create_all(engine)
    except DBAPIError:
        # Each table that another process made first is seen at the next look; there are no more than tables.
        for _ in Base.metadata.sorted_tables:
            with contextlib.suppress(DBAPIError):
                Base.metadata.create_all(engine)
                return
        raise


def _move_usage(engine: Engine) -> None:
    """Move what an earlier version counted, in a table for servers with one model."""
    if not inspect(engine).has_table("usage"):
        return
    columns = "tenant, hour, session_id, kind, base_model, count"
    with contextlib.suppress(DBAPIError), engine.begin() as transaction:  # another process may be first
        transaction.execute(text(f"INSERT INTO usage_by_model ({columns}) SELECT {columns} FROM usage"))
        transaction.execute(text("DROP TABLE usage"))


def _check_tables(engine: Engine) -> None:
    """
    Raises:
        InvalidRequest: if a table lacks a required column.
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
    """The file of a SQLite database; None if it has none."""
    name = engine.url.database or ":memory:"
    is_file = engine.dialect.name == "sqlite" and name != ":memory:" and not name.startswith("file:")
    return Path(name) if is_file else None


def _unusable(engine: Engine, error: DBAPIError) -> InvalidRequest:
    """The error of a server that can't start on its database."""
    reason = str(error.orig).splitlines()[0][:200]
    path = _path_of(engine)
    if path is None:
        return InvalidRequest(
            f"storage.database_url: the database at {engine.url.render_as_string()} can't be used ({reason}); see that "
            "it exists, that it can be reached from here, and that its user may create tables in it"
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
    """Keep keys' hashes and tenants' metadata from other users; SQLite's further files get the same mode."""
    if path.parent.is_dir():  # otherwise opening it fails, with a message
        with contextlib.suppress(OSError):
            private_file(path)
            for suffix in ("-wal", "-shm"):
                tighten_if_there(Path(f"{path}{suffix}"))


def _tune_sqlite(connection: object, _record: object) -> None:
    # Write-ahead logging lets readers continue during a write; a second server on the same file waits.
    cursor = connection.cursor()  # pyright: ignore
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
