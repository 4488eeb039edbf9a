"""What happens when a process of the model has ended: it is started anew, every live run is put back, clients are told.

A run of which nothing was lost goes on as if nothing had been. Any other is set back to its snapshot, and what its
client sends fails until the client has been told. Evicted runs are left where they are.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from twinkle.protocol import messages as m
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.runs import LiveRun
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.snapshots import Progress, Snapshots
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.jobs import Job
from twinkle.server.scheduling.scheduler import Scheduler

log = logging.getLogger("twinkle.engine")

# A new process that ends while runs are being put back onto it is started anew in turn, so often.
_ATTEMPTS = 3


@dataclass(eq=False)
class _SetBack:
    """What a run's client has to be told.

    Attributes:
        told_in: requests that failed with the notice.
        over_from: the first `seq_id` that was sent by a client that knew; None before it has been told.
    """

    notice: str
    told_in: set[str] = field(default_factory=set[str])
    over_from: int | None = None


class SetBacks:
    """Runs that were set back, until their clients know. Single-threaded: called on one event loop.

    Whatever was sent in the belief of the lost state fails: all that had arrived when the client fetched the first of
    these failures, and what comes late of that.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._runs: dict[str, _SetBack] = {}

    def add(self, run_id: str, notice: str) -> None:
        self._runs[run_id] = _SetBack(notice)

    def failure_of(self, job: Job) -> m.Failure | None:
        """What the job fails with, if it was sent by a client that didn't know."""
        run = self._runs.get(job.run_id)
        # A load makes the state whole, whatever it was; an end needs none.
        if run is None or isinstance(job.request, m.LoadWeightsRequest | m.UnloadModelRequest):
            return None
        if run.over_from is not None and job.seq_id >= run.over_from:
            del self._runs[job.run_id]
            return None
        run.told_in.add(job.request_id)
        return m.Failure(error=run.notice, category="server")

    def fetched(self, run_id: str, request_id: str) -> None:
        """A client has fetched the outcome of a request on a run."""
        run = self._runs.get(run_id)
        if run is not None and run.over_from is None and request_id in run.told_in:
            run.over_from = self._scheduler.queue(run_id).next_free

    def forget(self, run_id: str) -> None:
        """The run has ended, or has loaded a checkpoint."""
        self._runs.pop(run_id, None)


class Recovery:
    """Brings a lost worker back, with its runs."""

    def __init__(
        self,
        worker: WorkerPort,
        snapshots: Snapshots,
        residency: Residency,
        sampler_adapters: SamplerAdapters,
        set_backs: SetBacks,
    ) -> None:
        self._worker = worker
        self._snapshots = snapshots
        self._residency = residency
        self._sampler_adapters = sampler_adapters
        self._set_backs = set_backs

    async def recover(self, loss: WorkerLost) -> None:
        """
        Raises:
            Exception: if the worker could not be started anew, or not be brought to work.
        """
        began = time.monotonic()
        set_back: set[str] = set()
        for attempt in range(1, _ATTEMPTS + 1):
            log.warning("A process of the model ended (%s): starting it anew. Requests wait.", loss.reason)
            try:
                await self._restart(set_back)
                break
            except WorkerLost as again:
                if attempt == _ATTEMPTS:
                    raise
                loss = again
        restored = len(self._lost_runs())
        log.warning(
            "The model is back after %.0f s: %d run%s restored, %d of them set back.",
            time.monotonic() - began,
            restored,
            "s" * (restored != 1),
            len(set_back),
        )

    async def _restart(self, set_back: set[str]) -> None:
        """Start anew, put every run back, note in `set_back` those that lost something."""
        await self._worker.restart()
        self._residency.worker_lost()
        self._sampler_adapters.forget_all()
        await warm_up(self._worker)
        for run in self._lost_runs():
            progress = await self._restore(run)
            if not progress.is_safe:
                set_back.add(run.run_id)
                self._set_backs.add(run.run_id, notice(progress))

    def _lost_runs(self) -> list[LiveRun]:
        """Those whose adapters were on the worker."""
        return [run for run in self._snapshots.runs() if not self._residency.is_evicted(run.run_id)]

    async def _restore(self, run: LiveRun) -> Progress:
        """Put one run back; returns what it had come to before."""
        await self._worker.add_adapter(run.run_id, run.spec)
        state = await self._snapshots.read(run.run_id)
        if state is not None:
            await self._worker.import_adapter(run.run_id, state)
        progress = self._snapshots.progress(run.run_id)
        self._snapshots.restored(run.run_id)
        self._residency.recount(run.run_id)
        return progress


def notice(progress: Progress) -> str:
    """What the client of a run that was set back is told."""
    of_all = f" (of {progress.steps})" if progress.steps > progress.safe_steps else ""
    if not progress.is_readable:
        state = "a new adapter, since its snapshot can't be read"
    elif progress.safe_steps == 0:
        state = f"its state before its first optimizer step{of_all}"
    else:
        state = f"its state after optimizer step {progress.safe_steps}{of_all}"
    return (
        f"the process that held the model ended and was started anew; this run was set back to {state}, and what came "
        "after that is lost: train on from there, or load a checkpoint"
    )
