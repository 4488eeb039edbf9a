"""The log as it is shown: one record a line, from whatever process."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from twinkle.server import logs
from twinkle.server.config import LogSection
from twinkle.server.serve import worker_output

log = logging.getLogger("twinkle.test")


def lines_of(section: LogSection) -> list[str]:
    """What is shown of some records."""
    stream = io.StringIO()
    with logs.shown(section, stream):
        log.debug("details")
        log.info("a run begins", extra=logs.about("s:train:0", "grace", rank=8))
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("it failed\nas told")
    return stream.getvalue().splitlines()


def test_text() -> None:
    first, second, *traceback = lines_of(LogSection())
    # sha256("grace"), as other programs compute it, begins with these digits.
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     a run begins  run=s:train:0 tenant=e010fd1c rank=8", first
    )
    assert second.endswith(r"ERROR    it failed\nas told")
    assert traceback[0].startswith("Traceback") and traceback[-1] == "ValueError: no"


def test_marks_of_other_libraries_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logging.getLogRecordFactory()

    def marked(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = plain(*arguments, **more)
        record.__dict__["_ray_timestamp_ns"] = 1
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", marked)
    assert not [line for line in lines_of(LogSection()) if "ray" in line]


def test_json() -> None:
    first, second = map(json.loads, lines_of(LogSection(format="json")))
    when = datetime.fromisoformat(first.pop("time"))
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    assert first == {
        "level": "info",
        "message": "a run begins",
        "run": "s:train:0",
        "tenant": "e010fd1c",
        "rank": 8,
    }
    assert second["message"] == "it failed\nas told" and second["exception"].endswith("ValueError: no")


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 1)])
def test_level(level: Any, count: int) -> None:
    assert len(lines_of(LogSection(level=level, format="json"))) == count


def test_a_file_gets_the_same(tmp_path: Path) -> None:
    path = tmp_path / "below" / "twinkle.log"
    shown = lines_of(LogSection(file=path))
    assert path.read_text(encoding="utf-8").splitlines() == shown


def test_afterwards_logging_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    lines_of(LogSection())
    logging.getLogger("twinkle.test").warning("seen")
    assert "seen" in caplog.messages


@pytest.fixture
def sent(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Lines that another process would write."""
    logger = logging.getLogger("twinkle")
    before = logger.handlers[:], logger.propagate, logger.level
    logs.send("engine")
    log.info("a run begins", extra=logs.about("s:train:0"))
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("two\nlines")
    logger.handlers, logger.propagate, logger.level = before
    yield capsys.readouterr().err.splitlines()


def test_other_processes_records_are_shown_as_ones_own(sent: list[str]) -> None:
    assert len(sent) == 2
    stream = io.StringIO()
    batch = {
        "pid": 7,
        "actor_name": "Rank",
        "is_err": True,
        "lines": [*sent, sent[0][:50], "Loading: 12%|# ", ""],
    }
    other = {"pid": "raylet", "lines": ["Lease ID: 0000"]}
    library = {"pid": 7, "actor_name": "Rank", "lines": ["\x1b[36mCUDA is slow today\x1b[0m"]}
    with logs.shown(LogSection(), stream):
        for each in (batch, other, library):
            worker_output._show(each)
    shown = stream.getvalue().splitlines()
    assert shown[0].endswith("INFO     a run begins  run=s:train:0 source=engine")
    assert shown[1].endswith(r"ERROR    two\nlines  source=engine") and "ValueError: no" in shown
    assert shown[-1].endswith("INFO     CUDA is slow today  source=Rank")
    assert "Lease" not in stream.getvalue() and "12%" not in stream.getvalue()
