"""How callers' threads talk to the engine's thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TypeAlias

from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.sequences import Task


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class AdapterRemoved:
    adapter: ResidentAdapter


Message: TypeAlias = Task | Cancel | AdapterRemoved


class Inbox:
    """Messages in order: a cancellation only concerns requests that came before it. Thread-safe."""

    def __init__(self) -> None:
        self.lock = (
            threading.Condition()
        )  # notified of every change; may be taken again by the thread that holds it
        self.is_closed = False
        self._messages: list[Message] = []

    def put(self, message: Message) -> None:
        with self.lock:
            self._messages.append(message)
            self.lock.notify()

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            self.lock.notify()

    def receive(self, wait: bool) -> list[Message] | None:
        """Everything that has arrived; None once the inbox is closed.

        Args:
            wait: until there is something.
        """
        with self.lock:
            self.lock.wait_for(lambda: self.is_closed or self._messages or not wait)
            return None if self.is_closed else self.take()

    def take(self) -> list[Message]:
        """Everything that has arrived, closed or not."""
        with self.lock:
            messages, self._messages = self._messages, []
            return messages
