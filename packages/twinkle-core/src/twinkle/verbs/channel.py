"""The only seam between the verbs and what executes them."""

from concurrent.futures import Future
from typing import Protocol

from twinkle.protocol import messages as m


class Channel(Protocol):
    """Sends requests. May be called from any thread; returns at once.

    In a forked process, a channel with threads starts over or refuses requests: see `forks`.
    """

    def prepare(self, base_model: str | None) -> None:
        """Called before the first request for a base model, so that local mode can load it."""
        ...

    def submit(self, request: m.Operation) -> Future[m.Result]:
        """Send an operation; the future ends with its result, or with a `TwinkleError`."""
        ...

    def ask(self, query: m.Query[m.ReplyT]) -> Future[m.ReplyT]:
        """Send a query; the future ends with its reply, or with a `TwinkleError`."""
        ...

    def hurry(self) -> None:
        """Called when the program ends: from then on, wait only briefly for a server that can't be reached."""
        ...

    def close(self) -> None:
        """Close connections and threads. Requests in flight are abandoned."""
        ...
