"""Which engines a server with several is to have, and what each of them may use."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence

from twinkle.hub import plain_name
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.config import ModelEntry, ServerConfig
from twinkle.server.plan import Plan, make_plan, num_gpus
from twinkle.server.store.database import Database
from twinkle.server.store.private import private_directory
from twinkle.server.store.tables import Engine


def server_id(config: ServerConfig) -> str:
    """The name of this server among all that use its database; made when it is first asked for."""
    directory = config.storage.directory / "live"
    private_directory(directory)
    path = directory / f"{config.server.port}.server"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(f"{config.server.port}-{uuid.uuid4().hex[:16]}", encoding="ascii")
        os.replace(partial, path)
    return path.read_text(encoding="ascii")


def new_row(server: str, rows: Iterable[Engine], entry: ModelEntry, is_added: bool) -> Engine:
    """The row of one more engine, to be started."""
    number = max((int(row.name[1:]) for row in rows), default=0) + 1
    return Engine(
        server=server,
        name=f"e{number}",
        base_model=plain_name(entry.model_id),
        entry=_as_json(entry),
        is_added=is_added,
        wanted="run",
        state="starting",
    )


def entry_of(row: Engine) -> ModelEntry:
    return ModelEntry.model_validate_json(row.entry)


def _as_json(entry: ModelEntry) -> str:
    return entry.model_dump_json(exclude_unset=True)


def plan_all(
    config: ServerConfig, database: Database, server: str, gpus_of_cluster: int | None
) -> dict[str, Plan]:
    """The engines to start, by name: those that the configuration lists, and those that were added while the server
    ran, less those that were drained or removed.

    Args:
        gpus_of_cluster: as in `make_plan`.

    Raises:
        InvalidRequest, NotFound: as `make_plan` and `share_out`.
    """
    rows = _rows_of_file(config, database, server)
    entries = [entry_of(row) for row in rows]
    plans: dict[str, Plan] = {}
    for row, entry, gpus in zip(rows, entries, share_out(config, entries, gpus_of_cluster), strict=True):
        # One that is started again later gets as many as now.
        kept = entry if gpus is None else entry.model_copy(update={"num_gpus": gpus})
        database.change_engine(server, row.name, entry=_as_json(kept))
        plans[row.name] = plan_engine(config, entry, gpus, gpus_of_cluster)
    return plans


def plan_file(config: ServerConfig) -> list[Plan]:
    """What the configuration alone has started: one plan for each engine. Raises as `plan_all`."""
    if not config.has_door:
        return [make_plan(config)]
    entries = [entry for entry in config.entries for _ in range(entry.replicas)]
    shares = share_out(config, entries, None)
    return [plan_engine(config, entry, gpus, None) for entry, gpus in zip(entries, shares, strict=True)]


def _rows_of_file(config: ServerConfig, database: Database, server: str) -> list[Engine]:
    """The rows of the engines to start. New ones get one; what is listed no more is no longer wanted."""
    rows = database.engines(server)
    free = [row for row in rows if not row.is_added and (row.moved_to is None or row.wanted != "run")]
    for entry in config.entries:
        for _ in range(entry.replicas):
            row = next((row for row in free if row.base_model == plain_name(entry.model_id)), None)
            if row is None:
                row = new_row(server, rows, entry, is_added=False)
                database.add_engine(row)
                rows.append(row)
            else:
                free.remove(row)
                row.entry = _as_json(entry)
    for row in free:
        row.wanted = "remove"
    to_start = [row for row in rows if row.wanted == "run" and row.moved_to is None]
    for row in rows:
        if row not in to_start:  # it may say what was true when the server was killed
            database.change_engine(server, row.name, wanted=row.wanted, state="stopped", runs=0)
    return to_start


def plan_engine(
    config: ServerConfig, entry: ModelEntry, gpus: int | None, gpus_of_cluster: int | None
) -> Plan:
    """
    Args:
        gpus: of this engine; None where it computes on the CPU.

    Raises:
        InvalidRequest, NotFound: as `make_plan`; or if it isn't said how many GPUs it may have.
    """
    if num_gpus(config, gpus_of_cluster) == 0:
        gpus = config.ray.num_gpus
    elif gpus is None:
        raise InvalidRequest(
            f"models: {entry.model_id}: say how many of the GPUs are for it (num_gpus): the others of this server have "
            "theirs already"
        )
    return make_plan(config.of_engine(entry, gpus), gpus_of_cluster)


def share_out(
    config: ServerConfig, entries: Sequence[ModelEntry], gpus_of_cluster: int | None
) -> list[int | None]:
    """How many GPUs each engine may use; None where all compute on the CPU.

    Args:
        entries: one for each engine.

    Raises:
        InvalidRequest: if they are not enough, or don't come out even though all are to be used.
    """
    gpus = num_gpus(config, gpus_of_cluster)
    if not gpus:
        return [None] * len(entries)
    asked = sum(entry.num_gpus or 0 for entry in entries)
    others = sum(entry.num_gpus is None for entry in entries)
    left = gpus - asked
    if left < others:
        raise InvalidRequest(
            f"models: {len(entries)} engines, which take a GPU each at least, and num_gpus: {asked} in all where it is "
            f"given; but {gpus} can be used here; list fewer models or replicas, raise ray.num_gpus if there are more, "
            "or set ray.num_gpus: 0 to compute on the CPU"
        )
    share = left // others if others else 0
    if share * others != left and config.ray.num_gpus is not None:
        raise InvalidRequest(
            f"ray.num_gpus: {gpus} GPUs are to be used, but {left} of them can't be shared out equally to {others} "
            "engines; give the models num_gpus, or set a ray.num_gpus that comes out even"
        )
    return [share if entry.num_gpus is None else entry.num_gpus for entry in entries]
