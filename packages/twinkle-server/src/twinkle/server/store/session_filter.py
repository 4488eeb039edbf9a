"""The conditions of a search for sessions that a database can check, and the rows it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, false, func, or_

from twinkle.server.store.tables import Session


@dataclass(frozen=True)
class FoundSession:
    """A session without its metadata, which may be long."""

    id: str
    created_at: float
    display_name: str | None
    finished_at: float | None
    finish_reason: str | None
    finish_detail: str | None


COLUMNS = (
    Session.id,
    Session.created_at,
    Session.display_name,
    Session.finished_at,
    Session.finish_reason,
    Session.finish_detail,
)


@dataclass(frozen=True)
class SessionFilter:
    """Conditions that must all hold; None is no condition.

    Attributes:
        session_id, words: if both are given, either is enough; `words` are in lower case, and all must be in the name.
    """

    project_ids: Sequence[str] | None = None
    session_id: str | None = None
    words: Sequence[str] | None = None
    is_finished: bool | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if self.project_ids is not None:
            found.append(Session.project_id.in_(self.project_ids))
        if self.is_finished is not None:
            is_open = Session.finished_at.is_(None)
            found.append(~is_open if self.is_finished else is_open)
        if self.session_id is not None or self.words is not None:
            is_it = Session.id == self.session_id if self.session_id is not None else false()
            found.append(or_(is_it, self._is_named()))
        return found

    def _is_named(self) -> ColumnElement[bool]:
        if self.words is None:
            return false()
        # SQLite lower-cases only ASCII: the other words are left to the reader of the rows.
        known = [word for word in self.words if word.isascii()]
        name = func.lower(Session.display_name)
        return and_(
            Session.display_name.is_not(None), *(name.contains(word, autoescape=True) for word in known)
        )
