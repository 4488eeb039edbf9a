"""Futures of requests that nobody made."""

from itertools import count

from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.runs import Run

_numbers = count(1)


def create(table: FutureTable, tenant: str = "t", run: Run | None = None, tokens: int = 0) -> str:
    """A new future's request id."""
    request_id = f"request {next(_numbers)}"
    table.create(request_id, tenant, "session", run, tokens)
    return request_id
