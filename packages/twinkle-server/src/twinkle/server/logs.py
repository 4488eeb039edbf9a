"""The server's log: one record a line, as text or JSON, from all its processes.

Modules log as usual, `logging.getLogger("twinkle...")`, with a sentence and, by `extra`, what it is about (`about`): a
run, a tenant. The process that the user has started shows records, on stderr and in a file; the others write them to
their stderr in a form of their own (`send`), which Ray brings to that process (`serve/worker_output.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any, TextIO

from twinkle.server.config import LogSection

LOGGER = "twinkle"
LEVEL_VARIABLE = "TWINKLE_LOG_LEVEL"

# What a line of a record that is sent begins with.
_MARK = "twinkle-record "
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def about(run: str | None = None, tenant: str | None = None, **more: Any) -> dict[str, Any]:
    """What a record is about, for `extra`.

    Args:
        tenant: shown as the first eight hexadecimal digits of its SHA-256: enough to tell tenants apart.
        more: further fields, by any name that a `LogRecord` doesn't have.
    """
    found = {"run": run, "tenant": None if tenant is None else short_hash(tenant), **more}
    return {name: value for name, value in found.items() if value is not None}


def short_hash(tenant: str) -> str:
    return hashlib.sha256(tenant.encode()).hexdigest()[:8]


# ---------------------------------------------------------------- showing


@contextmanager
def shown(section: LogSection, stream: TextIO | None = None) -> Generator[None]:
    """While entered, this process shows what it and others log.

    Raises:
        OSError: if the file can't be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr if stream is None else stream)]
    if section.file is not None:
        path = section.file.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(WatchedFileHandler(path, encoding="utf-8"))  # may be moved away by logrotate
    for handler in handlers:
        handler.setFormatter(_Json() if section.format == "json" else _Text())
    with _handled(handlers, section.level.upper()):
        yield


@contextmanager
def _handled(handlers: list[logging.Handler], level: str) -> Generator[None]:
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate, logging.raiseExceptions
    # A stream that nobody reads any more must not end the server.
    logging.raiseExceptions = False
    logger.propagate = False
    logger.setLevel(level)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.level, logger.propagate, logging.raiseExceptions = before
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the record is about. (Ray marks all records of a process with names of its own, which begin with `_`.)"""
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_")
    }


class _Text(logging.Formatter):
    """`2026-12-01 18:20:03 INFO     a run begins  run=9f3c:train:0 tenant=1b2a63c4`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in fields_of(record).items())
        line = super().formatMessage(record) + (f"  {fields}" if fields else "")
        return line.replace("\r", "\\r").replace(
            "\n", "\\n"
        )  # a name that a client sent is no line of its own


class _Json(logging.Formatter):
    """An object a line: `time` (ISO 8601, UTC), `level`, `message`, what it is about, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        found = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        found |= fields_of(record)
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            found["exception"] = record.exc_text
        return json.dumps(found, ensure_ascii=False, default=str)


# ---------------------------------------------------------------- sending


def send(source: str) -> None:
    """From now on, this process sends what it logs to the one that shows it.

    Args:
        source: what this process is, a field of its records.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Sent(source))
    logger = logging.getLogger(LOGGER)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(os.environ.get(LEVEL_VARIABLE, "INFO"))


class _Sent(logging.Formatter):
    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info else None
        sent = {
            "created": record.created,
            "levelno": record.levelno,
            "levelname": record.levelname,
            "name": record.name,
            "msg": record.getMessage(),
            "exc_text": exception,
            **fields_of(record),
            "source": self._source,
        }
        return _MARK + json.dumps(sent, default=str)


def received(line: str) -> logging.LogRecord | None:
    """The record that a line of another process's stderr is; None if it is something else."""
    _, found, sent = line.partition(_MARK)
    if not found:
        return None
    try:
        return logging.makeLogRecord(json.loads(sent))
    except ValueError:  # cut off: its process was killed
        return None
