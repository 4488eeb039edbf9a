"""Queries about usage, the audit log and API keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, tuple_, update

from twinkle.server.store.connection import Connection, again_if_taken
from twinkle.server.store.tables import ApiKey, Audit, Run, Secret, Usage, belongs_to

_usage_columns = tuple_(Usage.tenant, Usage.hour, Usage.session_id, Usage.kind, Usage.base_model)


class AccountRows(Connection):
    def write_ledger(self, usage: Sequence[Usage], run_times: dict[str, float]) -> None:
        """Add to the usage so far, and record when each run last got a request."""

        def write() -> None:
            with self.transaction() as session:
                # In one order, lest two processes wait for each other's rows.
                for row in sorted(usage, key=_usage_key):
                    add = update(Usage).where(_usage_columns == _usage_key(row))
                    added = session.execute(add.values(count=Usage.count + row.count).returning(Usage.count))
                    if added.first() is None:
                        session.add(_copy(row))
                        session.flush()
                for run_id, time in sorted(run_times.items()):
                    session.execute(update(Run).where(Run.id == run_id).values(last_request_at=time))

        again_if_taken(write)

    def usage(self, tenant: str, first_hour: int, end_hour: int) -> list[Usage]:
        """By hour, then by amount, largest first; a tenant's or `EVERYBODY`'s, as in `storage` and `audit`."""
        query = select(Usage).where(
            belongs_to(tenant, Usage.tenant), Usage.hour >= first_hour, Usage.hour < end_hour
        )
        with self.transaction() as session:
            return list(session.scalars(query.order_by(Usage.hour, Usage.count.desc(), Usage.kind)))

    def audit(self, tenant: str, start: float, end: float, resource: str | None) -> list[Audit]:
        """Entries in a time span, oldest first; `resource` is a prefix of the event's name."""
        query = select(Audit).where(belongs_to(tenant, Audit.tenant), Audit.time >= start, Audit.time < end)
        if resource is not None:
            query = query.where(Audit.event.startswith(resource, autoescape=True))
        with self.transaction() as session:
            return list(session.scalars(query.order_by(Audit.time, Audit.id)))

    # ------------------------------------------------------------ secrets and keys

    def secret(self, name: str, new: str) -> str:
        """The secret of that name, the same for all processes; `new`, if there was none."""

        def find_or_add() -> str:
            with self.transaction() as session:
                row = session.get(Secret, name)
                if row is None:
                    row = Secret(name=name, value=new)
                    session.add(row)
                    session.flush()
                return row.value

        return again_if_taken(find_or_add)

    def add_key(self, key: ApiKey) -> ApiKey:
        """Write a key's row; returns it with its id."""
        with self.transaction() as session:
            session.add(key)
        return key

    def keys(self, valid_only: bool = False) -> list[ApiKey]:
        """All tenants' keys, oldest first.

        Args:
            valid_only: leave out revoked ones.
        """
        query = select(ApiKey).order_by(ApiKey.id)
        if valid_only:
            query = query.where(ApiKey.revoked_at.is_(None))
        with self.transaction() as session:
            return list(session.scalars(query))

    def revoke_key(self, key_id: int, now: float) -> ApiKey | None:
        """The key, revoked now or before; None if there is none with that id."""
        with self.transaction() as session:
            row = session.get(ApiKey, key_id)
            if row is not None and row.revoked_at is None:
                row.revoked_at = now
            return row


def _usage_key(row: Usage) -> tuple[str, int, str, str, str]:
    return row.tenant, row.hour, row.session_id, row.kind, row.base_model


def _copy(row: Usage) -> Usage:
    """A new row: one that was added in a transaction that failed belongs to that."""
    return Usage(**{column.key: getattr(row, column.key) for column in Usage.__table__.columns})
