"""The supervised process's side: what it is to run with, how it fares, and when it is to end.

Both sides hold one end of a pair of sockets. Each message is a line of JSON. If the other end closes, whoever held it
has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from twinkle.protocol.errors import TwinkleError
from twinkle.server.serve.process_session import end_session

# What the supervisor sends after the configuration.
STOP = b'"stop"\n'


class Supervised:
    """A process's line to the supervisor that started it.

    Attributes:
        configuration: what the supervisor passes on.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # whatever outlives this process must not seem to be it
        self._socket = socket.socket(fileno=descriptor)
        self._orders = self._socket.makefile("rb")
        first = self._orders.readline()
        if not first:
            sys.exit("The supervisor of this process has ended.")
        self.configuration: str = json.loads(first)

    def watch(self, on_stop: Callable[[], None]) -> None:
        """From now on: call `on_stop`, in another thread, when this process is asked to end; and end it at once, with
        all that it started, when its supervisor ends.
        """
        threading.Thread(target=self._watch, args=(on_stop,), name="supervisor", daemon=True).start()

    def ready(self, configuration: str) -> None:
        """
        Args:
            configuration: what the next one is to be started with, if this one ends.
        """
        self._report({"ready": configuration})

    def failed(self, error: TwinkleError) -> None:
        """It can't start, or go on; the process ends now."""
        self._report({"status": error.status, "message": error.message})

    def _report(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the supervisor has ended; `_watch` knows
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self, on_stop: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            while order := self._orders.readline():
                if order == STOP:
                    on_stop()
        # Nobody would start this one again, and whoever starts another supervisor needs the port. Nothing accepted is
        # lost by that.
        if os.getsid(0) == os.getpid():
            end_session(os.getpid())
        os._exit(1)


def say(line: str) -> None:
    """To whoever started the server; that nobody reads it (any more) must not end it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
