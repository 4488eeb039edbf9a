"""The engines of a server that has several: started, watched, drained and stopped as their rows in the store want it.

The rows are the only thing that the server, its gateways and `twinkle-server models` share:

    wanted      run: it is to work; drain: it is to give its runs away, and stop; remove: it is to stop
    state       starting -> running -> draining -> stopped; failed: it is tried again after a while
    moved_to    the engine that has its runs now; what names this one then means that one

An engine's live runs are a journal and snapshots in a directory of its own. They go on in the next process of the same
engine, or are taken over by another engine of the same model, whenever this one does not work.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from twinkle.protocol.errors import ServerFault, TwinkleError
from twinkle.server.config import ServerConfig
from twinkle.server.plan import Plan
from twinkle.server.serve.engine_process import EngineProcess
from twinkle.server.serve.fleet_plan import entry_of, new_row, plan_engine
from twinkle.server.serve.supervised import say
from twinkle.server.store.database import Database
from twinkle.server.store.retry import StoreGone, is_transient
from twinkle.server.store.tables import Engine

log = logging.getLogger("twinkle.server")

_TURN_SECONDS = 1.0
# An engine that hasn't worked for so long gives its runs to another, if there is one.
_LOST_SECONDS = 60.0
# Seconds before an engine that could not start is tried again.
_RETRY_SECONDS = 30.0
# Gateways have read a row by then, and place nothing new on the engine.
_NOTICED_SECONDS = 2.5

Work: TypeAlias = Callable[[], None]


@dataclass
class _Known:
    """What is not in an engine's row.

    Attributes:
        process: None if it doesn't work.
        work: what is being done with it; nothing else is done meanwhile.
        lost_since: when it was last seen to work, if it doesn't answer; by the monotonic clock.
        retry_at: when it may be started again.
        drains_since: when it was seen that it is to be drained or removed.
    """

    process: EngineProcess | None = None
    work: Future[None] | None = None
    lost_since: float | None = None
    retry_at: float = 0.0
    drains_since: float | None = None


class Fleet:
    """Used on one thread; what takes time is done on others, one thing at a time for each engine."""

    def __init__(
        self, config: ServerConfig, database: Database, server: str, gpus_of_cluster: int | None
    ) -> None:
        """
        Args:
            server: whose engines they are.
            gpus_of_cluster: as in `make_plan`.
        """
        self._config = config
        self._database = database
        self._server = server
        self._gpus_of_cluster = gpus_of_cluster
        self._known: dict[str, _Known] = {}
        self._threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="engine")

    def start(self, plans: dict[str, Plan]) -> None:
        """Start these engines, side by side; returns when all of them work.

        Raises:
            ServerFault: if one can't be started.
        """
        for name in plans:
            self._set(name, state="starting", message="")
        starts = {name: self._threads.submit(self._start_process, name, plan) for name, plan in plans.items()}
        for name, start in starts.items():
            try:
                start.result()
            except TwinkleError as error:
                raise ServerFault(
                    f"{plans[name].config.model.model_id} could not be started: {error.message}"
                ) from error

    def _start_process(self, name: str, plan: Plan) -> None:
        process = EngineProcess.start(self._config, plan, name, self.live(name))
        known = self._of(name)
        known.process, known.lost_since, known.retry_at = process, None, 0.0
        self._set(name, state="running", message="")

    def run(self, stop: threading.Event) -> None:
        """Do what the rows want, until `stop` is set."""
        is_logged = False
        while not stop.wait(_TURN_SECONDS):
            try:
                self._turn()
                is_logged = False
            except Exception as error:
                if not is_logged:
                    log.log(
                        logging.WARNING if is_transient(error) else logging.ERROR,
                        "the engines could not be looked after; it is tried again: %s",
                        error,
                        exc_info=None if is_transient(error) else error,
                    )
                is_logged = True

    def close(self) -> None:
        """Let all engines finish their writes, and end them."""
        processes = [known.process for known in self._known.values() if known.process is not None]
        list(self._threads.map(EngineProcess.close, processes))
        with contextlib.suppress(StoreGone):  # then `models list` says what was
            for name, known in self._known.items():
                if known.process is not None:
                    self._set(name, state="stopped", runs=0)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._database.close()

    # ------------------------------------------------------------ one turn

    def _turn(self) -> None:
        rows = self._database.engines(self._server)
        for row in rows:
            known = self._of(row.name)
            if known.work is not None and not known.work.done():
                continue
            work = self._next_work(row, known, rows)
            known.work = None if work is None else self._threads.submit(self._do, row, work)

    def _do(self, row: Engine, work: Work) -> None:
        try:
            work()
        except Exception as error:
            message = error.message if isinstance(error, TwinkleError) else f"{type(error).__name__}: {error}"
            log.error("engine %s of %s: %s", row.name, row.base_model, message)
            known = self._of(row.name)
            known.retry_at = time.monotonic() + _RETRY_SECONDS
            state = "failed" if known.process is None else row.state
            self._set(row.name, state=state, message=message)

    def _next_work(self, row: Engine, known: _Known, rows: list[Engine]) -> Work | None:
        """What is to be done about an engine now; None: nothing."""
        if known.process is None:
            return self._work_on_stopped(row, known, rows)
        process = known.process
        other = self._other(row, rows)
        if row.wanted == "run":
            known.drains_since = None
            is_lost = known.lost_since is not None and time.monotonic() - known.lost_since > _LOST_SECONDS
            if is_lost and other is not None:
                return lambda: self._end_lost(row, process)
            return lambda: self._look(row, known, process)
        if known.drains_since is None:
            known.drains_since = time.monotonic()
            self._set(row.name, state="draining")
        is_noticed = time.monotonic() - known.drains_since > _NOTICED_SECONDS
        if is_noticed and (row.wanted == "remove" or other is not None or row.runs == 0):
            return lambda: self._stop(row, process)
        return lambda: self._look(row, known, process)

    def _work_on_stopped(self, row: Engine, known: _Known, rows: list[Engine]) -> Work | None:
        if row.moved_to is not None or time.monotonic() < known.retry_at:
            return None
        other = self._other(row, rows)
        if other is not None and row.state in ("failed", "stopped") and self.live(row.name).is_dir():
            process = self._of(other.name).process
            assert process is not None, "it works"
            return lambda: self._move(row, other.name, process)
        if row.wanted == "run":
            return lambda: self._start(row)
        if row.state != "stopped":
            self._set(row.name, state="stopped", runs=0)
        return None

    def _other(self, row: Engine, rows: Iterable[Engine]) -> Engine | None:
        """The engine that can take over another's runs: of those that work, the one with fewest."""
        others = [
            other
            for other in rows
            if other.name != row.name
            and (other.base_model, other.state, other.wanted) == (row.base_model, "running", "run")
            and self._of(other.name).process is not None
            and self._of(other.name).lost_since is None
        ]
        return min(others, key=lambda other: other.runs, default=None)

    # ------------------------------------------------------------ what is done; on other threads

    def _start(self, row: Engine) -> None:
        self._set(row.name, state="starting")
        entry = entry_of(row)
        plan = plan_engine(self._config, entry, entry.num_gpus, self._gpus_of_cluster)
        say("\n".join(plan.describe()))
        self._start_process(row.name, plan)
        say(f"Engine {row.name} with {row.base_model} is ready.")

    def _look(self, row: Engine, known: _Known, process: EngineProcess) -> None:
        try:
            runs = process.runs()
        except Exception as error:
            if known.lost_since is None:
                known.lost_since = time.monotonic()
                log.warning("engine %s of %s doesn't work just now: %s", row.name, row.base_model, error)
            return
        known.lost_since = None
        if runs != row.runs or row.message:
            self._set(row.name, runs=runs, message="")

    def _stop(self, row: Engine, process: EngineProcess) -> None:
        process.close()
        self._of(row.name).process = None
        self._set(row.name, state="stopped")
        say(f"Engine {row.name} with {row.base_model} has stopped.")

    def _end_lost(self, row: Engine, process: EngineProcess) -> None:
        say(f"Engine {row.name} with {row.base_model} doesn't come back; another takes over its runs.")
        process.end()
        self._of(row.name).process = None
        self._set(row.name, state="failed", message="it did not come back")

    def _move(self, row: Engine, target: str, process: EngineProcess) -> None:
        """Give a stopped engine's runs to one that works. One that is still wanted begins anew, without any."""
        runs = process.adopt(self.live(row.name))
        self._set(row.name, state="stopped", moved_to=target, runs=0)
        say(f"{runs} runs of engine {row.name} go on in engine {target}.")
        if row.wanted == "run":
            entry = entry_of(row)
            self._database.add_engine(
                new_row(self._server, self._database.engines(self._server), entry, row.is_added)
            )

    # ------------------------------------------------------------ their state

    def live(self, name: str) -> Path:
        return self._config.storage.directory / "live" / self._server / name

    def _of(self, name: str) -> _Known:
        return self._known.setdefault(name, _Known())

    def _set(self, name: str, **values: object) -> None:
        self._database.change_engine(self._server, name, **values)
