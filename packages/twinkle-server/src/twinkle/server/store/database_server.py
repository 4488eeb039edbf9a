"""A database server, such as PostgreSQL: how to connect to it, and what its errors mean."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.store.retry import DatabaseGone

log = logging.getLogger("twinkle.server")

# Plain URLs of PostgreSQL mean psycopg 3, the driver of the extra `postgresql`.
_POSTGRESQL = ("postgresql", "postgres")
# A server that is switched off answers nothing at all.
_CONNECT_SECONDS = 5


def make_engine(url: str) -> Engine:
    """The engine for a SQLAlchemy URL.

    Raises:
        InvalidRequest: if it is none, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername in _POSTGRESQL:
            parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, **_options(parsed))
    except ImportError as error:
        extra = " (pip install 'twinkle-server[postgresql]')" if error.name == "psycopg" else ""
        raise InvalidRequest(
            f"storage.database_url: its driver {error.name} is not installed{extra}"
        ) from error
    except (ArgumentError, ValueError) as error:  # its message may have the URL, with the password
        raise InvalidRequest(
            "storage.database_url: not a URL of SQLAlchemy, or of a database that it doesn't know; PostgreSQL's are "
            "postgresql://USER@HOST/DATABASE"
        ) from error


def _options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {}
    # A connection that the server has closed since is replaced before it is used.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername == "postgresql+psycopg" and "connect_timeout" not in url.query:
        options["connect_args"] = {"connect_timeout": _CONNECT_SECONDS}
    return options


class DatabaseServer:
    """Tells what the errors of a database server mean. Thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_gone = False

    @contextmanager
    def errors(self) -> Generator[None]:
        """
        Raises:
            DatabaseGone: if the server can't be reached, or can't do it now.
            InvalidRequest: if it can't hold a value.
        """
        try:
            yield
        except DataError as error:  # SQLite holds any
            raise InvalidRequest(
                f"a text or number of the request can't be stored ({_reason(error)}); make it shorter, and without "
                "NUL characters"
            ) from error
        except (DBAPIError, PoolTimeout) as error:
            if not _is_temporary(error):
                raise
            with self._guard:
                if not self._is_gone:
                    log.error(
                        "the database can't be reached, or can't work just now (%s); what needs it waits, or is "
                        "answered 503",
                        _reason(error),
                    )
                self._is_gone = True
            raise DatabaseGone(
                "the server's database can't be reached just now: try again later", retry_after=5.0
            ) from error
        if self._is_gone:
            with self._guard:
                self._is_gone = False
            log.warning("the database is back: the server goes on with it")


def _is_temporary(error: DBAPIError | PoolTimeout) -> bool:
    """Whether a connection was lost or refused, or the server is overloaded, full, shutting down or starting up."""
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        return True
    return error.connection_invalidated


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0][:200]
