"""What the tables promise beyond what the services' tests see."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.store.database import Database
from twinkle.server.store.ledger import Ledger
from twinkle.server.store.tables import Checkpoint, Usage


def test_a_database_of_another_version_is_named_and_left_alone(database_url: str):
    database = Database(database_url)
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE sessions DROP COLUMN project_id"))
    database.close()
    with pytest.raises(InvalidRequest, match="table 'sessions' has no project_id"):
        Database(database_url)


async def test_usage_adds_up_over_writes_and_failures(database_url: str, monkeypatch: pytest.MonkeyPatch):
    database = Database(database_url)
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


def a_checkpoint(run: str, name: str, moment: float, tenant: str = "t") -> Checkpoint:
    return Checkpoint(
        run_id=run,
        kind="weights",
        name=name,
        tenant=tenant,
        base_model="the/model",
        created_at=moment,
        size_bytes=1,
        rank=2,
        train_attn=True,
        train_mlp=True,
        train_unembed=False,
        public=False,
    )


@pytest.mark.parametrize("leap", [-86_400.0, 0.0, 365 * 86_400.0])
def test_the_newest_checkpoint_is_the_one_that_was_saved_last_whatever_the_clock_says(
    database_url: str, leap: float
):
    database = Database(database_url)
    now = 1_800_000_000.0
    # The clock leaps after the first, and back after the third.
    for run, moment in (("a", now), ("b", now + leap), ("c", now + leap), ("d", now)):
        database.put_checkpoint(a_checkpoint(run, "name", moment))
        database.put_checkpoint(a_checkpoint(run, f"other-{run}", moment))
        newest = database.checkpoint("t", CheckpointUri("name"), now)
        assert newest is not None and newest.run_id == run
    listed, _ = database.checkpoints("t", now)
    assert [row.run_id for row in listed] == ["d", "d", "c", "c", "b", "b", "a", "a"]
    database.put_checkpoint(a_checkpoint("z", "name", now, tenant="other"))
    elsewhere = database.checkpoint("other", CheckpointUri("name"), now)
    assert elsewhere is not None and elsewhere.created_at == now, "another tenant's have no part in it"
    database.close()


def test_a_checkpoint_that_is_overwritten_is_told_from_the_old_one_by_a_clock_that_stands(database_url: str):
    database = Database(database_url)
    uri = CheckpointUri("name", "run", "weights")
    seen: list[float] = []
    for _ in range(3):
        database.put_checkpoint(a_checkpoint("run", "name", 1_800_000_000.0))
        row = database.checkpoint_row(uri)
        assert row is not None
        seen.append(row.created_at)
    assert seen == sorted(set(seen)) and seen[0] == 1_800_000_000.0 and seen[2] < 1_800_000_000.01
    database.close()


def test_usage_of_an_earlier_version_is_kept(database_url: str):
    earlier = create_engine(database_url)
    with earlier.begin() as transaction:
        transaction.execute(
            text(
                "CREATE TABLE usage (tenant VARCHAR(64), hour INTEGER, session_id VARCHAR(64), kind VARCHAR(32), "
                "base_model VARCHAR(512) NOT NULL, count BIGINT NOT NULL, "
                "PRIMARY KEY (tenant, hour, session_id, kind))"
            )
        )
        transaction.execute(text("INSERT INTO usage VALUES ('t', 7, 's', 'training', 'm', 5)"))
    earlier.dispose()
    for counted in (8, 11):
        database = Database(database_url)
        more = [
            Usage(tenant="t", hour=7, session_id="s", kind="training", base_model=model, count=3)
            for model in ("m", "other")
        ]
        database.write_ledger(more, {})
        assert [(row.base_model, row.count) for row in database.usage("t", 7, 8)] == [
            ("m", counted),
            ("other", counted - 5),
        ]
        database.close()
