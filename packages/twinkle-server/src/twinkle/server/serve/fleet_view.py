"""What a gateway knows of a server's engines: which there are, what is placed on them, and where new runs go."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence

from twinkle.hub import plain_name
from twinkle.protocol.errors import InvalidRequest, Unavailable
from twinkle.server.store.database import Database
from twinkle.server.store.retry import DatabaseGone
from twinkle.server.store.tables import Engine

# How old the list of engines may be.
_FRESH_SECONDS = 1.0
_MAX_REMEMBERED = 65_536
# By then the server has counted a new run.
_COUNTED_SECONDS = 5.0


class FleetView:
    """Single-threaded: called on one event loop. The database is the only thing that gateways share."""

    def __init__(self, database: Database, server: str) -> None:
        """
        Args:
            server: whose engines these are.
        """
        self._database = database
        self._server = server
        self._engines: dict[str, Engine] = {}
        self._read_at = -_FRESH_SECONDS
        self._reading = asyncio.Lock()
        self._placed: dict[str, str] = {}
        # When something was placed on which engine, latest last.
        self._begun: deque[tuple[float, str]] = deque()

    async def engines(self) -> dict[str, Engine]:
        """By name. While the database is away, they are taken to be as they were."""
        async with self._reading:
            if time.monotonic() - self._read_at < _FRESH_SECONDS:
                return self._engines
            try:
                rows = await asyncio.to_thread(self._database.engines, self._server)
                self._engines = {row.name: row for row in rows}
            except DatabaseGone:
                if not self._engines:
                    raise
            self._read_at = time.monotonic()
            return self._engines

    async def models(self) -> list[str]:
        """The plain names of those that are served, each once."""
        rows = (await self.engines()).values()
        return list(dict.fromkeys(row.base_model for row in rows if row.state == "running"))

    async def now_at(self, engine: str) -> str:
        """The engine that has what this one had."""
        engines = await self.engines()
        seen = {engine}
        while (row := engines.get(engine)) is not None and row.moved_to and row.moved_to not in seen:
            engine = row.moved_to
            seen.add(engine)
        return engine

    async def front(self) -> str:
        """The engine that is asked what any of them could answer, and knows of all sessions: the first that works.

        Raises:
            Unavailable: if none does.
        """
        for name, row in (await self.engines()).items():
            if row.state == "running":
                return name
        raise Unavailable("no engine of this server is ready", 2.0)

    async def placement(self, placed_id: str) -> str | None:
        """The engine that a run or sampling session is on; None for one that was never placed here."""
        engine = self._placed.get(placed_id)
        if engine is None:
            engine = await asyncio.to_thread(self._database.placement, placed_id, self._server)
            if engine is None:
                return None
            self._remember(placed_id, engine)
        return await self.now_at(engine)

    async def of_session(self, session_id: str) -> set[str]:
        """Engines on which something of the session is."""
        found = await asyncio.to_thread(self._database.engines_of_session, session_id, self._server)
        return {await self.now_at(engine) for engine in found}

    async def place(self, placed_id: str, session_id: str, model: str, beside: str | None = None) -> str:
        """The engine that a run or sampling session is on; a new one is placed where there are fewest runs.

        Args:
            model: any id of the base model.
            beside: an engine that is preferred, if it can take it.

        Raises:
            InvalidRequest: if that model isn't served here.
            Unavailable: if no engine with it takes new runs now.
        """
        if (engine := await self.placement(placed_id)) is not None:
            return engine
        candidates = await self._candidates(model)
        engine = next((row.name for row in candidates if row.name == beside), None)
        if engine is None:
            begun = self._begun_lately()
            engine = min(candidates, key=lambda row: row.runs + begun[row.name]).name
        self._begun.append((time.monotonic(), engine))
        return await self.put(placed_id, session_id, engine)

    async def put(self, placed_id: str, session_id: str, engine: str) -> str:
        """Place a run or sampling session on this engine, unless it was placed before; returns where it is now."""
        engine = await asyncio.to_thread(self._database.place, placed_id, session_id, self._server, engine)
        self._remember(placed_id, engine)
        return await self.now_at(engine)

    def _begun_lately(self) -> Counter[str]:
        """What was placed on each engine, and may not be in its row yet."""
        while self._begun and time.monotonic() - self._begun[0][0] > _COUNTED_SECONDS:
            self._begun.popleft()
        return Counter(engine for _, engine in self._begun)

    def _remember(self, placed_id: str, engine: str) -> None:
        if len(self._placed) >= _MAX_REMEMBERED:
            self._placed.clear()  # the database has them
        self._placed[placed_id] = engine

    async def any_with(self, model: str) -> str:
        """An engine with a base model. Raises as `place`."""
        return (await self._candidates(model))[0].name

    async def _candidates(self, model: str) -> Sequence[Engine]:
        rows = (await self.engines()).values()
        of_model = [row for row in rows if row.base_model == plain_name(model) and row.moved_to is None]
        taking = [row for row in of_model if row.state == "running" and row.wanted == "run"]
        if taking:
            return taking
        if any(row.wanted == "run" for row in of_model):
            raise Unavailable(f"base_model: {model[:200]!r} is being started; try again", 5.0)
        served = ", ".join(repr(name) for name in await self.models()) or "none just now"
        raise InvalidRequest(
            f"base_model: {model[:200]!r} is not served here; this server's models are {served}"
        )
