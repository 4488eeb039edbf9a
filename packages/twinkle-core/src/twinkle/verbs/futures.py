"""Futures that stand in for their results: a verb returns at once, and using its result waits for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Generic, TypeVar, cast

from tqdm import tqdm

from twinkle.protocol.errors import TwinkleError

T = TypeVar("T")
U = TypeVar("U")

# Shorter waits show no progress bar.
QUIET_SECONDS = 3.0


class Pending(Generic[T]):
    """The result of an operation that may still be running.

    `.result()` waits for it, `await` waits without blocking, and attributes of the result can be read directly (which
    waits too): `sampling_client.sample(...).sequences[0].tokens`. A list result can be indexed and iterated.
    """

    def __init__(self, future: Future[T], doing: str, seen: threading.Event | None = None) -> None:
        """
        Args:
            doing: what the operation is, for the progress bar.
            seen: set once the outcome has been looked at; views of one operation share it.
        """
        self._future = future
        self._doing = doing
        self._seen = seen or threading.Event()
        self._process = os.getpid()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: seconds; default: no limit.

        Raises:
            TwinkleError: if the operation failed; or, in a forked process, if it was still running.
            TimeoutError: if it does not finish in time; the operation continues.
        """
        self._require_answer_here()
        try:
            return wait(self._future, self._doing, timeout)
        finally:
            if self._future.done():
                self._seen.set()

    def cancel(self) -> bool:
        """Abandon the operation. A sample stops soon; training and saving are carried out all the same.

        Returns:
            False if it has already ended.
        """
        self._seen.set()
        return self._future.cancel()

    def done(self) -> bool:
        return self._future.done()

    def unseen_failure(self) -> BaseException | None:
        """The exception, if the operation failed and nobody has looked yet; this call counts as looking."""
        if self._seen.is_set() or not self._future.done():
            return None
        self._seen.set()
        return self._future.exception()

    def wait_done(self) -> None:
        """Wait until the operation has ended, successfully or not, without looking at the outcome."""
        try:
            self._require_answer_here()
            wait(self._future, self._doing, None)
        except Exception:
            return  # still counts as unseen

    def then(self, change: Callable[[T], U]) -> Pending[U]:
        """A view of the result, transformed by `change`."""
        return Pending(chain([self._future], lambda results: change(results[0])), self._doing, self._seen)

    def __await__(self) -> Generator[Any, None, T]:
        self._require_answer_here()
        self._seen.set()
        return asyncio.wrap_future(self._future).__await__()

    def _require_answer_here(self) -> None:
        if self._process != os.getpid() and not self._future.done():
            raise TwinkleError(
                f"{self._doing}: it was under way when this process was forked, and is answered in the parent "
                "alone; look at the result before forking, or ask again here"
            )

    # By name, since a result may be of any type: `sample(...).sequences` works like a finished result's.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy, pickle and Jupyter probe for these, which must not wait
            raise AttributeError(name)
        return getattr(self.result(), name)

    def __iter__(self) -> Iterator[Any]:
        return iter(cast(Any, self.result()))

    def __len__(self) -> int:
        return len(cast(Any, self.result()))

    def __getitem__(self, key: Any) -> Any:
        return cast(Any, self.result())[key]

    def __bool__(self) -> bool:  # otherwise `if pending:` would call `__len__`, and wait
        return True

    def __repr__(self) -> str:
        if not self._future.done():
            return f"<{self._doing}: under way>"
        return f"<{self._doing}: failed>" if self._future.exception() else repr(self._future.result())


def first_failure(pendings: Iterable[Pending[Any]]) -> tuple[BaseException | None, deque[Pending[Any]]]:
    """The first failure that nobody has looked at, and which are still under way. Those that have ended count as looked
    at after this.
    """
    failures: list[BaseException] = []
    under_way: deque[Pending[Any]] = deque()
    for pending in pendings:
        if not pending.done():
            under_way.append(pending)
        elif (failure := pending.unseen_failure()) is not None:
            failures.append(failure)
    return (failures[0] if failures else None), under_way


def wait(future: Future[T], doing: str, timeout: float | None = None) -> T:
    """The future's result; longer waits show a progress line on a terminal."""
    quiet = QUIET_SECONDS if timeout is None else min(timeout, QUIET_SECONDS)
    try:
        return future.result(quiet)
    except FutureTimeout:
        if future.done() or (timeout is not None and timeout <= quiet):
            raise
    left = None if timeout is None else timeout - quiet
    with tqdm(desc=doing, bar_format="{desc}: waiting {elapsed}", disable=None, leave=False) as bar:
        while left is None or left > 0:
            step = 1.0 if left is None else min(1.0, left)
            try:
                return future.result(step)
            except FutureTimeout:
                if future.done():
                    raise
            left = None if left is None else left - step
            bar.update()
    raise TimeoutError(f"{doing}: not done after {timeout} s; it goes on, ask again")


def chain(futures: list[Future[T]], combine: Callable[[list[T]], U]) -> Future[U]:
    """A future of `combine(results)`; it fails as soon as one of the futures does."""
    combined: Future[U] = Future()
    lock = threading.Lock()

    def on_done(_done: Future[T]) -> None:
        with lock:  # callbacks run in whichever thread completes a future
            failed = next((f for f in futures if f.done() and f.exception() is not None), None)
            if combined.done() or (failed is None and not all(f.done() for f in futures)):
                return
            try:
                combined.set_result(combine([f.result() for f in ([failed] if failed else futures)]))
            except Exception as error:
                combined.set_exception(error)

    for future in futures:
        future.add_done_callback(on_done)
    return combined
