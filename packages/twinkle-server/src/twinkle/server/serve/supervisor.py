"""Keeps a program running: starts it, starts it again when it ends unasked, and ends all that it has started.

It knows neither Ray nor the model, so that nothing of theirs can end it. What the program itself has to do is
`supervised.py`.
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

# Before each further start without success, the last one for ever.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# What has been ready for so long is no failure to start: the pauses begin anew.
_STEADY_SECONDS = 60.0
# The engine has half a minute for what it is writing.
_STOP_SECONDS = 45.0
# The end of the program is seen on the line; this is for the case that something else holds the line's other end.
_LOOK_SECONDS = 5.0


class StopSignals:
    """SIGINT and SIGTERM, while it is entered, as something that can be waited for beside sockets.

    Attributes:
        asked: whether one of them has come.
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
        """Readable once a signal has come."""
        return self._receiver.fileno()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            self._sender.send(b".")


class _Life:
    """One process of the program, and what it has reported."""

    def __init__(
        self, command: Sequence[str], configuration: str, environment: dict[str, str] | None
    ) -> None:
        """
        Raises:
            ServerFault: if the system starts no process.
        """
        self._line, theirs = socket.socketpair()
        self._began_line = b""
        self.ready: str | None = None
        self.ready_at = 0.0
        self.error: TwinkleError | None = None
        with theirs:
            number = theirs.fileno()
            try:
                # A session of its own: Ctrl-C in a terminal reaches the supervisor alone, and whatever the process
                # starts is known by it.
                self.process = subprocess.Popen(
                    [*command, str(number)],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(number,),
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                self._line.close()
                raise ServerFault(f"no process could be started for the server ({error})") from error
        self._send(json.dumps(configuration).encode() + b"\n")

    def ask_to_stop(self) -> None:
        self._send(STOP)

    def wait(self, others: Sequence[int], seconds: float) -> bool:
        """Until there is something new, here or on other descriptors, or the time is over; False: it has ended."""
        if self._line not in wait([self._line, *others], seconds):
            return self.process.poll() is None
        try:
            part = self._line.recv(2**16)
        except ConnectionError:
            part = b""
        *lines, self._began_line = (self._began_line + part).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(part)

    def end(self, seconds: float) -> int:
        """The exit code, after so long at most; nothing that the process has started is left then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        end_session(self.process.pid)
        self._line.close()
        return self.process.wait()

    def _take(self, report: dict[str, Any]) -> None:
        if "ready" in report:
            self.ready, self.ready_at = report["ready"], time.monotonic()
        else:
            self.error = from_status(report["status"], report["message"])

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which is seen by whoever reads
            self._line.sendall(message)


class Supervisor:
    """Runs a program that uses `Supervised`, for as long as nobody asks for its end."""

    def __init__(
        self,
        command: Sequence[str],
        configuration: str,
        *,
        check: Callable[[], None],
        on_ready: Callable[[str], None],
        surroundings: Callable[[], AbstractContextManager[dict[str, str] | None]] = nullcontext,
        pauses: Sequence[float] = _PAUSES,
        steady_seconds: float = _STEADY_SECONDS,
        stop_seconds: float = _STOP_SECONDS,
    ) -> None:
        """
        Args:
            command: of the program; the number of its line's descriptor is added.
            check: called before each start; raises a `TwinkleError` if there is no use in it.
            on_ready: called each time the program is ready, with the configuration that it reports.
            surroundings: entered for each process of the program: the environment that it gets, this process's own if
                None.
            pauses: seconds before a further start, by how many have come to nothing; the last one from then on.
            steady_seconds: after so long of being ready, `pauses` begin anew.
            stop_seconds: how long the program may take to end in order.
        """
        self._command = command
        self._configuration = configuration
        self._check = check
        self._on_ready = on_ready
        self._surroundings = surroundings
        self._pauses = pauses
        self._steady_seconds = steady_seconds
        self._stop_seconds = stop_seconds
        self._has_been_ready = False
        self._tries = 0

    def run(self) -> None:
        """Until SIGINT or SIGTERM; nothing that the program has started is left then.

        Raises:
            TwinkleError: if the program can't start, before it has been ready once: as it was raised there.
        """
        with StopSignals() as signals:
            while not signals.asked:
                try:
                    self._check()
                    what = self._live(signals) + ": starting the server again"
                except TwinkleError as error:
                    if not self._has_been_ready:
                        raise
                    what = f"The server could not be started again: {error.message}\nTrying again"
                if not signals.asked:
                    self._pause(what, signals)

    def _live(self, signals: StopSignals) -> str:
        """One process of the program, from its start until nothing is left of it; says how a ready one ended.

        Raises:
            TwinkleError: if it ended before it was ready.
        """
        with self._surroundings() as environment:
            life = _Life(self._command, self._configuration, environment)
            try:
                self._follow(life, signals)
            finally:
                code = life.end(self._stop_seconds if life.error or signals.asked else 1.0)
        if life.ready is not None:
            if time.monotonic() - life.ready_at >= self._steady_seconds:
                self._tries = 0
            return life.error.message if life.error else f"The server's process has ended ({_how(code)})"
        if life.error is not None:
            raise life.error
        if not signals.asked:
            raise ServerFault(f"the server's process ended before it was ready ({_how(code)})")
        return ""

    def _follow(self, life: _Life, signals: StopSignals) -> None:
        was_ready, asked_at = False, None
        while life.wait([] if signals.asked else [signals.fileno()], _LOOK_SECONDS):
            if life.ready is not None and not was_ready:
                was_ready = self._has_been_ready = True
                self._configuration = life.ready
                self._on_ready(life.ready)
            if signals.asked and asked_at is None:
                asked_at = time.monotonic()
                life.ask_to_stop()
            if asked_at is not None and time.monotonic() > asked_at + self._stop_seconds:
                say("The server did not end in order: its processes are killed.")
                life.process.kill()

    def _pause(self, what: str, signals: StopSignals) -> None:
        seconds = self._pauses[min(self._tries, len(self._pauses) - 1)]
        self._tries += 1
        say(f"{what} in {seconds:g} s; requests wait.")
        if wait([signals.fileno()], seconds):
            say("Stopping.")


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
