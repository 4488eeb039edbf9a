"""Operations on the pretended device, and waits for it, by the line of the project that caused them."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_OURS = ("/twinkle/server/", "/twinkle_megatron/")
_HERE = "/pretended_cuda/"


class Counts:
    """What happened on the device since the last `reset`, in all threads.

    Attributes:
        operations: by name; about as many as kernels would be launched. Views and allocations don't count.
        waits: host-device synchronisations, by "KIND at FILE:LINE".
    """

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reset(self) -> None:
        with self._lock:
            self.operations.clear()
            self.waits.clear()

    def add_operation(self, name: str) -> None:
        with self._lock:
            self.operations[name] += 1

    def add_wait(self, kind: str) -> None:
        where = f"{kind} at {line()}"
        with self._lock:
            self.waits[where] += 1

    @contextmanager
    def of(self) -> Generator[Counts]:
        """Counts of what happens inside alone, complete when it ends."""
        found = Counts()
        before = self.operations.copy(), self.waits.copy()
        yield found
        found.operations = self.operations - before[0]
        found.waits = self.waits - before[1]


COUNTS = Counts()


def line() -> str:
    """The innermost line of the project that is running, as FILE:LINE; of a library if none of the project's is."""
    frame: FrameType | None = sys._getframe(1)
    other = "?"
    while frame is not None:
        file = frame.f_code.co_filename
        for place in _OURS:
            if place in file:
                return f"{file.rpartition(place)[2]}:{frame.f_lineno}"
        if other == "?" and _HERE not in file and "/torch/" not in file:
            other = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return other
