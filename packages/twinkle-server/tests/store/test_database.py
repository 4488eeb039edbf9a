"""What the tables promise beyond what the services' tests see."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.store.database import Database
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.tables import Usage


def test_a_database_of_another_version_is_named_and_left_alone(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'old.sqlite'}"
    database = Database(url)
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE sessions DROP COLUMN project_id"))
    database.close()
    with pytest.raises(InvalidRequest, match="table 'sessions' has no project_id"):
        Database(url)


async def test_usage_adds_up_over_writes_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    ledger = Ledger(database, "the/model")
    ledger.record("t", "session", "training", 5)
    await ledger.flush()
    ledger.record("t", "session", "training", 7)
    ledger.record("t", "session", "checkpoint", 1)
    with monkeypatch.context() as broken:
        broken.setattr(database, "write_ledger", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await ledger.flush()
    ledger.record("other", "session", "training", 100)
    await ledger.flush()

    def shown(rows: list[Usage]) -> dict[str, int]:
        return {row.kind: row.count for row in rows}

    assert shown(database.usage("t", 0, 2**30)) == {"training": 12, "checkpoint": 1}
    assert shown(database.usage("other", 0, 2**30)) == {"training": 100}
    database.close()
