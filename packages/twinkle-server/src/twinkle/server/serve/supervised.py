"""The supervised process's side: gets its configuration, reports its state, and is asked to stop.

Each side holds one end of a socket pair. A message is a line of JSON. If the other end closes, its process has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from twinkle.protocol.errors import TwinkleError
from twinkle.server.serve.process_session import end_session

log = logging.getLogger("twinkle.server")

# What the supervisor sends after the configuration.
STOP = b'"stop"\n'


class Supervised:
    """A process's connection to the supervisor that started it.

    Attributes:
        configuration: what the supervisor passes on.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # a child that outlives this process would keep it open
        self._socket = socket.socket(fileno=descriptor)
        self._orders = self._socket.makefile("rb")
        first = self._orders.readline()
        if not first:
            sys.exit("The supervisor of this process has ended.")
        self.configuration: str = json.loads(first)

    def watch(self, on_stop: Callable[[], None]) -> None:
        """From now on, call `on_stop` on another thread when this process is asked to stop. If the supervisor ends,
        this process ends at once, with everything it started.
        """
        threading.Thread(target=self._watch, args=(on_stop,), name="supervisor", daemon=True).start()

    def ready(self, configuration: str) -> None:
        """
        Args:
            configuration: for the next process, if this one ends.
        """
        self._report({"ready": configuration})

    def failed(self, error: TwinkleError) -> None:
        """Report why this process can't start or go on; it ends after that."""
        self._report({"status": error.status, "message": error.message})

    def _report(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the supervisor has ended, which `_watch` notices
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _watch(self, on_stop: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            while order := self._orders.readline():
                if order == STOP:
                    on_stop()
        # Nobody would restart this process, and another supervisor needs its port. Nothing accepted is lost.
        if os.getsid(0) == os.getpid():
            end_session(os.getpid())
        os._exit(1)


def say(words: str) -> None:
    """Tell the user who started the server: a record for each line, a warning if it begins with `WARNING: `."""
    for line in words.splitlines():
        sentence = line.removeprefix("WARNING: ")
        log.log(logging.INFO if sentence == line else logging.WARNING, "%s", sentence)
