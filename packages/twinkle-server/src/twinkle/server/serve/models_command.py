"""What `twinkle-server models` does: it reads and writes the rows of a server's engines, which the server follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from twinkle.hub import plain_name
from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.server.config import ModelEntry, ServerConfig
from twinkle.server.serve.fleet_plan import new_row, server_id
from twinkle.server.store.database import Database
from twinkle.server.store.tables import Engine

_POLL_SECONDS = 0.5
# A server looks at the rows every second.
_ANSWER_SECONDS = 30.0


def listed(config: ServerConfig, database: Database) -> list[Engine]:
    """The engines of the server, less those whose place another has taken."""
    rows = database.engines(server_id(config))
    return [row for row in rows if row.moved_to is None or row.wanted != "run"]


def add(config: ServerConfig, database: Database, entry: ModelEntry) -> list[Engine]:
    """Rows for as many engines as the entry has replicas; the running server starts them.

    Raises:
        InvalidRequest: if this configuration's server has one engine alone.
    """
    _check_has_door(config)
    server, rows = server_id(config), database.engines(server_id(config))
    added: list[Engine] = []
    for _ in range(entry.replicas):
        row = new_row(server, [*rows, *added], entry, is_added=True)
        database.add_engine(row)
        added.append(row)
    return added


def set_wanted(config: ServerConfig, database: Database, named: str, wanted: str) -> list[Engine]:
    """Drain or remove one engine, or all of a model; returns their rows.

    Args:
        named: an engine's name, or a model's.

    Raises:
        InvalidRequest: if there is none.
    """
    _check_has_door(config)
    rows = listed(config, database)
    found = [row for row in rows if row.name == named] or [
        row for row in rows if row.base_model == plain_name(named)
    ]
    if not found:
        known = ", ".join(f"{row.name} ({row.base_model})" for row in rows) or "none"
        raise InvalidRequest(f"{named}: this server has no such engine or model; it has {known}")
    for row in found:
        database.change_engine(row.server, row.name, wanted=wanted)
    return found


def _check_has_door(config: ServerConfig) -> None:
    if not config.has_door:
        raise InvalidRequest(
            "model: a server with one `model` has one engine for ever; list it under `models` instead (a list, with "
            "the same keys in each entry), and start the server again"
        )


def wait(
    database: Database, rows: Sequence[Engine], states: Sequence[str], on_change: Callable[[Engine], None]
) -> None:
    """Wait until each of these engines is in one of these states.

    Args:
        on_change: called with a row whose state or message has changed.

    Raises:
        ServerFault: if one of them fails, or no server follows the rows.
    """
    seen = {row.name: (row.state, row.message) for row in rows}
    begun = time.monotonic()
    while True:
        now = {row.name: row for row in database.engines(rows[0].server) if row.name in seen}
        for row in now.values():
            if seen[row.name] != (row.state, row.message):
                seen[row.name] = row.state, row.message
                begun = float("inf")
                on_change(row)
            if row.state == "failed" and "failed" not in states:
                raise ServerFault(f"engine {row.name}: {row.message}; the server goes on trying")
        if all(row.state in states for row in now.values()):
            return
        if time.monotonic() - begun > _ANSWER_SECONDS:
            raise ServerFault("no server does anything about it: is it running? It will when it is started")
        time.sleep(_POLL_SECONDS)
