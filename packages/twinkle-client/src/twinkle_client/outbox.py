"""Holds passes for a moment, so that a training step's pass and its optimizer step go in one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from twinkle.protocol.operations import MAX_OPERATIONS, Posted

# How long a pass is held: long against the time between two calls of a loop, short against a training step.
LINGER_SECONDS = 0.002
# A larger body gains nothing from sharing a request, and is better sent while the next one is being made.
MAX_BYTES = 131_072


@dataclass(frozen=True, eq=False)
class Item:
    """An operation, and the future of its result."""

    posted: Posted
    future: Future[Any]


@dataclass(eq=False)
class _Waiting:
    items: list[Item] = field(default_factory=list[Item])
    size: int = 0
    timer: asyncio.TimerHandle | None = None


class Outbox:
    """Items by run, in the order in which they were added. Single-threaded: called on one event loop."""

    def __init__(self, send: Callable[[list[Item]], None]) -> None:
        """
        Args:
            send: starts to send items in one request.
        """
        self._send = send
        self._waiting: dict[str, _Waiting] = {}

    def add(self, run_id: str, item: Item, ends_step: bool) -> None:
        """Send the item together with those of its run that are held, at once or in a moment.

        Args:
            ends_step: it is not held, and neither are those before it.
        """
        waiting = self._waiting.setdefault(run_id, _Waiting())
        waiting.items.append(item)
        waiting.size += len(item.posted.body)
        if ends_step or waiting.size >= MAX_BYTES or len(waiting.items) >= MAX_OPERATIONS:
            self._flush(run_id)
        elif waiting.timer is None:
            waiting.timer = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._flush, run_id)

    def take_all(self) -> list[Item]:
        """The items that are held, which are then not sent."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        for of_run in waiting:
            if of_run.timer is not None:
                of_run.timer.cancel()
        return [item for of_run in waiting for item in of_run.items]

    def _flush(self, run_id: str) -> None:
        waiting = self._waiting.pop(run_id)
        if waiting.timer is not None:
            waiting.timer.cancel()
        self._send(waiting.items)
