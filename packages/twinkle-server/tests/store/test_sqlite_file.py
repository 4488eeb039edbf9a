"""A database whose file is moved, deleted, replaced or damaged, while it is open and before it is opened."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.store.database import Database
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import Session


def a_session(name: str) -> Session:
    return Session(id=name, tenant="t", created_at=1.0)


def names(database: Database) -> set[str]:
    return set(database.session_ids("t", 10_000))


def names_in(path: Path) -> set[str]:
    """As another program reads them, after a check of every page."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    found = {row[0] for row in connection.execute("SELECT id FROM sessions")}
    connection.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "storage").mkdir()
    return tmp_path / "storage" / "test.sqlite"


@pytest.fixture
def away(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere" / "moved.sqlite"


MANY = {f"old-{number}" for number in range(300)}


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    """With more rows than a page has, the last of them in the write-ahead log alone."""
    database = Database(f"sqlite:///{path}")
    for name in sorted(MANY):
        database.put(a_session(name))
    yield database
    database.close()


def rescued(path: Path) -> list[Path]:
    return list(path.parent.glob("*.rescued-*"))


def check_is_gone(database: Database) -> None:
    with pytest.raises(DatabaseGone, match="not where it was: nothing was changed; try again"):
        names(database)
    with pytest.raises(DatabaseGone):
        database.put(a_session("lost"))


def test_what_is_moved_away_and_back_goes_on(
    database: Database, path: Path, away: Path, caplog: pytest.LogCaptureFixture
):
    path.rename(away)
    for _ in range(3):
        check_is_gone(database)
    assert not path.exists(), "no empty one takes its place"
    [said] = [record.getMessage() for record in caplog.records]
    assert str(path) in said and "was moved or deleted" in said and str(rescued(path)[0]) in said
    away.rename(path)
    assert names(database) == MANY
    database.put(a_session("new"))
    assert names(database) == {*MANY, "new"}
    assert rescued(path) == []
    assert "is back" in caplog.records[-1].getMessage() and len(caplog.records) == 2
    database.close()
    assert names_in(path) == {*MANY, "new"}


def test_what_was_moved_away_is_whole_without_its_log(database: Database, path: Path, away: Path):
    path.rename(away)
    check_is_gone(database)
    assert names_in(away) == MANY


def delete(path: Path) -> None:
    path.unlink()


def delete_with_log(path: Path) -> None:
    for file in path.parent.iterdir():
        file.unlink()


@pytest.mark.parametrize("remove", [delete, delete_with_log])
def test_of_what_is_deleted_there_is_a_copy_to_start_with(
    database: Database, path: Path, remove: Callable[[Path], None]
):
    remove(path)
    check_is_gone(database)
    [copy] = rescued(path)
    with pytest.raises(InvalidRequest, match=f"is not back; put it back, or move {copy.name} there"):
        Database(f"sqlite:///{path}")
    assert not path.exists()
    copy.rename(path)
    check_is_gone(database)  # it is another file: this server knows nothing of what is in it
    database.close()
    again = Database(f"sqlite:///{path}")
    assert names(again) == MANY
    again.put(a_session("new"))
    again.close()
    assert names_in(path) == {*MANY, "new"}


@pytest.mark.parametrize("noticed", ["before the end", "at the end"])
def test_one_that_takes_its_place_is_never_mixed_with_it(
    database: Database, path: Path, away: Path, noticed: str
):
    other = Database(f"sqlite:///{away}")
    other.put(a_session("other"))
    other.close()
    away.replace(path)
    if noticed == "before the end":
        check_is_gone(database)
    database.close()
    assert names_in(path) == {"other"}
    assert [names_in(copy) for copy in rescued(path)] == [MANY]
    again = Database(f"sqlite:///{path}")
    again.put(a_session("new"))
    assert names(again) == {"other", "new"}
    again.close()
    assert names_in(path) == {"other", "new"}


def test_one_that_was_changed_elsewhere_is_not_taken_back(database: Database, path: Path, away: Path):
    path.rename(away)
    check_is_gone(database)
    # By another process, as people do it: SQLite shares what it knows of a file with all connections of a process.
    change = "c.execute(\"UPDATE sessions SET tenant = 'another'\"); c.commit(); c.execute('PRAGMA wal_checkpoint')"
    subprocess.run(
        [sys.executable, "-c", f"import sqlite3; c = sqlite3.connect({str(away)!r}); {change}"], check=True
    )
    away.rename(path)
    check_is_gone(database)
    database.close()
    assert names_in(path) == MANY
    again = Database(f"sqlite:///{path}")
    assert names(again) == set()
    again.close()


def test_without_its_log_nothing_is_written_and_nothing_lost(database: Database, path: Path):
    Path(f"{path}-wal").unlink()
    check_is_gone(database)
    database.close()
    again = Database(f"sqlite:///{path}")
    assert names(again) == MANY
    again.close()


def test_a_log_that_somebody_reads_is_emptied_later(database: Database, path: Path, away: Path):
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM sessions").fetchone() == (len(MANY),)
    database.put(a_session("later"))
    path.rename(away)
    with pytest.raises(DatabaseGone):
        names(database)
    assert reader.execute("SELECT count(*) FROM sessions").fetchone() == (len(MANY),), (
        "it sees no other state"
    )
    reader.close()
    check_is_gone(database)
    assert Path(f"{path}-wal").stat().st_size == 0
    assert names_in(away) == {*MANY, "later"}


def test_the_place_for_a_copy_may_be_gone_too(database: Database, path: Path, tmp_path: Path):
    path.parent.rename(tmp_path / "whole directory")
    check_is_gone(database)
    (tmp_path / "whole directory").rename(path.parent)
    assert names(database) == MANY


# ---------------------------------------------------------------- before it is opened


def test_what_is_no_database_is_named_and_left_alone(path: Path):
    path.write_text("model:\n  model_id: x\n" * 100, encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(
        InvalidRequest, match=r"storage: .*/test\.sqlite is damaged.*not a database.*move it away"
    ):
        Database(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_damaged_one_is_named_and_left_alone(database: Database, path: Path):
    database.close()
    damaged = bytearray(path.read_bytes())
    damaged[100:4096] = b"\xff" * 3996  # what lists the tables; the file's own header is whole
    path.write_bytes(damaged)
    with pytest.raises(
        InvalidRequest, match=r"test\.sqlite is damaged.*malformed.*put a backup in its place"
    ):
        Database(f"sqlite:///{path}")
    assert path.read_bytes() == damaged


def test_one_that_can_not_be_opened_is_named(path: Path):
    path.mkdir()
    with pytest.raises(InvalidRequest, match=r"test\.sqlite can't be used \(unable to open"):
        Database(f"sqlite:///{path}")


def test_a_backup_in_its_place_is_opened(database: Database, path: Path, away: Path):
    database.close()
    shutil.copy(path, away)
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(InvalidRequest):
        Database(f"sqlite:///{path}")
    away.replace(path)
    again = Database(f"sqlite:///{path}")
    assert names(again) == MANY
    again.close()
