"""What the commands of `twinkle-server` have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinkle.server.config import ServerConfig
from twinkle.server.store.private import private_directory

if TYPE_CHECKING:
    from twinkle.server.store.database import Database

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", "-c", help="YAML file with at least `model: {model_id: ...}`.", show_default=False
    ),
]


@contextmanager
def open_database(config: ServerConfig) -> Generator[Database]:
    """The server's, which may be running."""
    from twinkle.server.store.database import Database  # imports sqlalchemy, which takes a moment

    private_directory(config.storage.directory)
    database = Database(config.storage.url)
    try:
        yield database
    finally:
        database.close()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """In columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
