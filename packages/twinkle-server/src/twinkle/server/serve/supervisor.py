"""Keeps a program running: starts it, restarts it when it ends unasked, and kills everything it has started.

Independent of Ray and the model, so that nothing of theirs can end it. The program's own side is `supervised.py`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Self

from twinkle.protocol.errors import ServerFault, TwinkleError, from_status
from twinkle.server.serve.process_session import end_session
from twinkle.server.serve.supervised import STOP, say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Seconds before restarts that follow failed starts; the last one from then on.
_BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# A program that has been ready for this long did not fail to start: the backoff is reset.
_STEADY_SECONDS = 60.0
# More than the half minute that the engine has for its writes.
_STOP_SECONDS = 45.0
# When the program ends its socket closes, unless a process that it started has inherited it; then this applies.
_POLL_SECONDS = 5.0


class StopSignals:
    """While entered, SIGINT and SIGTERM can be waited for together with sockets.

    Attributes:
        asked: whether one of them has arrived.
    """

    def __init__(self) -> None:
        self.asked = False
        self._receiver, self._sender = socket.socketpair()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._receiver.close()
        self._sender.close()

    def fileno(self) -> int:
        """Readable once a signal has arrived."""
        return self._receiver.fileno()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            self._sender.send(b".")


class _Child:
    """One process of the program, and what it has reported."""

    def __init__(
        self, command: Sequence[str], configuration: str, environment: dict[str, str] | None
    ) -> None:
        """
        Raises:
            ServerFault: if the system can't start a process.
        """
        self._socket, theirs = socket.socketpair()
        self._partial_line = b""
        self.ready: str | None = None
        self.ready_at = 0.0
        self.error: TwinkleError | None = None
        with theirs:
            number = theirs.fileno()
            try:
                # A session of its own: Ctrl-C in a terminal reaches the supervisor alone, and everything the process
                # starts can be found by the session.
                self.process = subprocess.Popen(
                    [*command, str(number)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(number,),
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                self._socket.close()
                raise ServerFault(f"no process could be started for the server ({error})") from error
        self._send(json.dumps(configuration).encode() + b"\n")

    def ask_to_stop(self) -> None:
        self._send(STOP)

    def wait(self, others: Sequence[int], seconds: float) -> bool:
        """Wait for a report, for other descriptors, or until the time is over; returns whether it still runs."""
        if self._socket not in wait([self._socket, *others], seconds):
            return self.process.poll() is None
        try:
            part = self._socket.recv(2**16)
        except ConnectionError:
            part = b""
        *lines, self._partial_line = (self._partial_line + part).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(part)

    def end(self, seconds: float) -> int:
        """Wait this long for it to end, then kill it and everything it has started; returns its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        end_session(self.process.pid)
        self._socket.close()
        return self.process.wait()

    def _take(self, report: dict[str, Any]) -> None:
        if "ready" in report:
            self.ready, self.ready_at = report["ready"], time.monotonic()
        else:
            self.error = from_status(report["status"], report["message"])

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which `wait` notices
            self._socket.sendall(message)


class Supervisor:
    """Runs a program that uses `Supervised` until it is asked to stop."""

    def __init__(
        self,
        command: Sequence[str],
        configuration: str,
        *,
        check: Callable[[], None],
        on_ready: Callable[[str], None],
        surroundings: Callable[[], AbstractContextManager[dict[str, str] | None]] = nullcontext,
        backoff: Sequence[float] = _BACKOFF,
        steady_seconds: float = _STEADY_SECONDS,
        stop_seconds: float = _STOP_SECONDS,
    ) -> None:
        """
        Args:
            command: of the program; its socket's descriptor is appended.
            check: called before each start; raises a `TwinkleError` if the program can't start.
            on_ready: called each time the program is ready, with the configuration that it reports.
            surroundings: entered for each process of the program, gives its environment; None: this process's own.
            backoff: seconds before the next start, by the number of failed starts; the last one from then on.
            steady_seconds: after being ready for this long, the backoff is reset.
            stop_seconds: how long the program may take to shut down.
        """
        self._command = command
        self._configuration = configuration
        self._check = check
        self._on_ready = on_ready
        self._surroundings = surroundings
        self._backoff = backoff
        self._steady_seconds = steady_seconds
        self._stop_seconds = stop_seconds
        self._has_been_ready = False
        self._tries = 0

    def run(self) -> None:
        """Returns after SIGINT or SIGTERM; nothing that the program started is left then.

        Raises:
            TwinkleError: what the program failed with, if it has never been ready.
        """
        with StopSignals() as signals:
            while not signals.asked:
                try:
                    self._check()
                    what = self._run_once(signals) + ": starting the server again"
                except TwinkleError as error:
                    if not self._has_been_ready:
                        raise
                    what = f"The server could not be started again: {error.message}\nTrying again"
                if not signals.asked:
                    self._pause(what, signals)

    def _run_once(self, signals: StopSignals) -> str:
        """Run one process of the program, from its start until nothing is left of it. Returns how it ended.

        Raises:
            TwinkleError: if it ended before it was ready.
        """
        with self._surroundings() as environment:
            child = _Child(self._command, self._configuration, environment)
            try:
                self._follow(child, signals)
            finally:
                code = child.end(self._stop_seconds if child.error or signals.asked else 1.0)
        if child.ready is not None:
            if time.monotonic() - child.ready_at >= self._steady_seconds:
                self._tries = 0
            return (
                child.error.message if child.error else f"The server's process has ended ({_exit_text(code)})"
            )
        if child.error is not None:
            raise child.error
        if not signals.asked:
            raise ServerFault(f"the server's process ended before it was ready ({_exit_text(code)})")
        return ""

    def _follow(self, child: _Child, signals: StopSignals) -> None:
        was_ready, asked_at = False, None
        while child.wait([] if signals.asked else [signals.fileno()], _POLL_SECONDS):
            if child.ready is not None and not was_ready:
                was_ready = self._has_been_ready = True
                self._configuration = child.ready
                self._on_ready(child.ready)
            if signals.asked and asked_at is None:
                asked_at = time.monotonic()
                child.ask_to_stop()
            if asked_at is not None and time.monotonic() > asked_at + self._stop_seconds:
                say("The server did not end in order: its processes are killed.")
                child.process.kill()

    def _pause(self, what: str, signals: StopSignals) -> None:
        seconds = self._backoff[min(self._tries, len(self._backoff) - 1)]
        self._tries += 1
        say(f"{what} in {seconds:g} s; requests wait.")
        if wait([signals.fileno()], seconds):
            say("Stopping.")


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
