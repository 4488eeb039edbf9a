"""The one seam between the verbs and whoever executes them."""

from concurrent.futures import Future
from typing import Protocol

from twinkle.protocol import messages as m


class Channel(Protocol):
    """Sends requests. May be called from any thread; returns at once.

    One with threads of its own begins anew, or refuses what is asked, in a forked process: see `forks`.
    """

    def prepare(self, base_model: str | None) -> None:
        """Told before anything is asked of a base model, so that local mode can load it."""
        ...

    def submit(self, request: m.Operation) -> Future[m.Result]:
        """Send an operation; the future ends with its result, or with a `TwinkleError`."""
        ...

    def ask(self, query: m.Query[m.ReplyT]) -> Future[m.ReplyT]:
        """Send a query; the future ends with its reply, or with a `TwinkleError`."""
        ...

    def hurry(self) -> None:
        """Told when the program ends: a server that can't be reached is not waited for any longer than that takes."""
        ...

    def close(self) -> None:
        """Let go of connections and threads. What is under way is abandoned."""
        ...
