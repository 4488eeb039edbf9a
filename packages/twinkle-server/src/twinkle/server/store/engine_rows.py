"""Queries about a server's engines, and about what is placed on them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update

from twinkle.protocol.uris import CheckpointUri
from twinkle.server.store.connection import Connection, again_if_taken
from twinkle.server.store.tables import Checkpoint, Engine, Placement


class EngineRows(Connection):
    def engines(self, server: str) -> list[Engine]:
        """All that this server has had, oldest first."""
        with self.transaction() as session:
            rows = session.scalars(select(Engine).where(Engine.server == server))
            return sorted(rows, key=lambda row: (len(row.name), row.name))  # e2 before e10

    def add_engine(self, row: Engine) -> None:
        with self.transaction() as session:
            session.add(row)

    def change_engine(self, server: str, name: str, **values: Any) -> None:
        """Set columns of an engine's row."""
        engine = (Engine.server == server) & (Engine.name == name)
        with self.transaction() as session:
            session.execute(update(Engine).where(engine).values(**values))

    # ------------------------------------------------------------ placements

    def place(self, placed_id: str, session_id: str, server: str, engine: str) -> str:
        """Place a run or sampling session on an engine, unless it has one; returns its engine."""

        def find_or_add() -> str:
            with self.transaction() as session:
                row = session.get(Placement, placed_id)
                if row is None:
                    row = Placement(id=placed_id, session_id=session_id, server=server, engine=engine)
                    session.add(row)
                    session.flush()
                return row.engine

        return again_if_taken(find_or_add)

    def placement(self, placed_id: str, server: str) -> str | None:
        """The engine that a run or sampling session was placed on at this server; None if it was not."""
        with self.transaction() as session:
            row = session.get(Placement, placed_id)
            return row.engine if row is not None and row.server == server else None

    def engines_of_session(self, session_id: str, server: str) -> set[str]:
        """Those on which something of the session was placed."""
        query = select(Placement.engine).distinct()
        query = query.where(Placement.session_id == session_id, Placement.server == server)
        with self.transaction() as session:
            return set(session.scalars(query))

    def base_model_of(self, uri: CheckpointUri, tenant: str) -> str | None:
        """The model that a checkpoint is on, whoever it belongs to; for a bare name, the tenant's newest one's."""
        query = select(Checkpoint.base_model).where(Checkpoint.name == uri.name)
        if uri.run_id is None:
            query = query.where(Checkpoint.tenant == tenant).order_by(Checkpoint.created_at.desc())
        else:
            query = query.where(Checkpoint.run_id == uri.run_id, Checkpoint.kind == uri.kind)
        with self.transaction() as session:
            return session.scalars(query.limit(1)).first()
