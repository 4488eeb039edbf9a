"""The engine's loop: `step` takes a call, has it computed, and completes its futures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from twinkle.protocol import messages as m
from twinkle.protocol.types import ForwardBackwardOutput
from twinkle.server.backends.protocol import StepOutcome
from twinkle.server.engine.adapters import AdapterJobs
from twinkle.server.engine.calls import (
    Call,
    CallQueue,
    CallTimes,
    InFlightCall,
    calls_of,
    pass_of,
    step_result,
    steps_of,
)
from twinkle.server.engine.failures import ENDED_TWICE, NOT_BACK, NOT_REPEATED, to_failure
from twinkle.server.engine.gaps import Gaps
from twinkle.server.engine.packing import Packed, pack, unpack
from twinkle.server.engine.recovery import recover
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.sampler_adapters import SamplerAdapters
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.tally import Tally
from twinkle.server.engine.worker import Trained, WorkerLost, WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.records import Outcome
from twinkle.server.scheduling.runs import Job, Run, RunState
from twinkle.server.scheduling.scheduler import Scheduler, Tick
from twinkle.server.store.ledger import Ledger

log = logging.getLogger("twinkle.engine")


class Engine:
    """Takes ticks from the scheduler, runs them on the worker, completes their futures; one call at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        futures: FutureTable,
        worker: WorkerPort,
        adapters: AdapterJobs,
        snapshots: Snapshots,
        residency: Residency,
        sampler_adapters: SamplerAdapters,
        ledger: Ledger,
    ) -> None:
        self._scheduler = scheduler
        self._futures = futures
        self._worker = worker
        self._adapters = adapters
        self._snapshots = snapshots
        self._residency = residency
        self._sampler_adapters = sampler_adapters
        self._ledger = ledger
        self._calls = CallQueue()
        self._in_flight: InFlightCall | None = None  # of a queued call that was dispatched ahead
        self._times = CallTimes()
        self._may_dispatch_ahead = True
        self._gaps = Gaps()
        self.tally = Tally()
        self._idle = asyncio.Event()
        self._has_failed = False

    @property
    def has_failed(self) -> bool:
        """Whether the worker was lost and could not be restarted, so that every job fails."""
        return self._has_failed

    def repeat(self, calls: Iterable[tuple[Job, ...]]) -> None:
        """Make another engine's calls, which no snapshot has, before all others. Before `run`, or between calls."""
        self._calls.repeat(calls)

    async def run(self) -> None:
        """Step forever, until cancelled."""
        try:
            while not self._has_failed:
                try:
                    await self.step()
                except WorkerLost as loss:
                    await self._recover(loss)
            self._idle.set()  # nothing is computed any more
            while True:
                self._fail((await self._scheduler.next_tick()).jobs)
        finally:
            self._drop_in_flight()
            self._adapters.close()

    async def step(self) -> None:
        """Compute the next call. One that fails is retried in smaller ones; after a loss of the worker, job by job."""
        call = await self._next_call()
        async with self._gaps.call():
            if self._calls.first is not call:
                return  # in a gap, others came before it
            try:
                with self.tally.timed(call):
                    left = await self._compute(call)
            except WorkerLost:
                self._calls.replace_first(self._after_loss(call))
                raise
            except Exception as error:
                left = await self._after_failure(call, error)
            self._calls.replace_first(left)

    def between_calls(self) -> AbstractAsyncContextManager[None]:
        """While entered nothing is computed, and `repeat` may be called."""
        return self._gaps.gap(lambda: self._in_flight is None)

    async def until_idle(self) -> None:
        """Wait until nothing is computed, which holds until the loop goes on. Stops dispatching ahead for good."""
        self._may_dispatch_ahead = False
        await self._idle.wait()

    # ------------------------------------------------------------ which call

    async def _next_call(self) -> Call:
        """The next repeated call, or else the next of the tick, or of a new one.

        Raises:
            WorkerLost: if it is lost meanwhile.
        """
        while True:
            for job in self._calls.skip_lost_runs():
                self._futures.complete(job.request_id, m.Failure(error=job.run.lost or "", category="server"))
            call = self._calls.first
            if call is not None and call.is_repeat:
                return call
            if self._in_flight is None:  # a snapshot would include what has been dispatched
                await self._snapshots.take_due()
            if call is not None:
                return call
            self._add(await self._wait_for_tick())

    async def _wait_for_tick(self) -> Tick:
        """The next tick, or an empty one when a snapshot is due."""
        ready = asyncio.ensure_future(self._scheduler.next_tick())
        lost = asyncio.ensure_future(self._worker.lost())
        try:
            timeout = self._snapshots.seconds_until_due()
            self._idle.set()
            await asyncio.wait({ready, lost}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._idle.clear()
            if ready.done():  # its jobs are in no queue any more, so they go first
                return ready.result()
            if lost.done():
                raise lost.result()
            return Tick()
        finally:
            ready.cancel()
            lost.cancel()

    def _add(self, tick: Tick) -> list[Call]:
        """Queue a tick's calls; returns those of its first part."""
        self._residency.expect(tick)
        parts = [calls_of(part) for half in tick.split_independent() for part in self._residency.split(half)]
        for calls in parts:
            self._calls.add(calls)
        return parts[0] if parts else []

    # ------------------------------------------------------------ one call

    async def _compute(self, call: Call) -> list[Call]:
        """Have a call computed and complete its futures; returns what is left of it."""
        if call.passes and call.optim_steps:
            return await self._train(call)
        if call.passes:
            await self._residency.bring_in(call.runs, adding_gradients=True)
            packed = self._pack(call.passes)
            results = await self._worker.forward_backward(packed.micro_batches)
            self._trained(call.passes, unpack(call.passes, packed, results))
        elif call.optim_steps:
            await self._residency.bring_in(call.runs)
            self._trained(
                steps=call.optim_steps, outcomes=await self._worker.optim_step(steps_of(call.optim_steps))
            )
        else:
            await self._adapters.run(call.only_job, call.is_repeat)
        return []

    async def _train(self, call: Call) -> list[Call]:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            await self._residency.bring_in(call.runs, adding_gradients=True)
            in_flight = self._dispatch(call)
        assert in_flight.call is call, "nothing else with passes and steps comes before it"
        results, outcomes = await self._result_of(in_flight)
        self._times.ended(in_flight, asyncio.get_running_loop().time())
        outputs = unpack(call.passes, in_flight.packed, results)
        if outcomes is None:
            self._trained(call.passes, outputs)
            return [replace(call, passes=())]
        self._trained(call.passes, outputs, call.optim_steps, outcomes)
        return []

    def _dispatch(self, call: Call) -> InFlightCall:
        packed = self._pack(call.passes)
        result = asyncio.create_task(self._worker.train(packed.micro_batches, steps_of(call.optim_steps)))
        now, cost = asyncio.get_running_loop().time(), packed.cost(self._worker.info)
        return InFlightCall(call, packed, result, now, cost)

    async def _result_of(self, in_flight: InFlightCall) -> Trained:
        """The result of a dispatched call; late in the call, the next one is dispatched behind it, if that is complete
        by then and no other call comes between the two.
        """
        late_at = self._times.late_at(in_flight)
        try:
            if late_at is not None and len(self._calls) == 1:
                await asyncio.wait({in_flight.result}, timeout=late_at - asyncio.get_running_loop().time())
                await self._dispatch_next_behind(in_flight)
            return await in_flight.result
        finally:
            in_flight.result.cancel()

    async def _dispatch_next_behind(self, in_flight: InFlightCall) -> None:
        """Dispatch the next call as soon as it is complete; returns without it once this call is done."""
        if in_flight.result.done():
            return
        complete = asyncio.create_task(self._scheduler.until_complete(in_flight.call.runs.keys()))
        try:
            await asyncio.wait({in_flight.result, complete}, return_when=asyncio.FIRST_COMPLETED)
            if not in_flight.result.done() and not complete.exception():
                self._dispatch_ahead(in_flight)
        finally:
            complete.cancel()
            [outcome] = await asyncio.gather(complete, return_exceptions=True)
            if isinstance(outcome, Exception):
                log.error("it could not be waited for the next tick", exc_info=outcome)

    def _dispatch_ahead(self, in_flight: InFlightCall) -> None:
        """Take the next tick and dispatch its first call, if none of its runs is in flight or evicted, so that neither
        call depends on the other. Not a coroutine: nothing else may run between the tick and the call.
        """
        if not self._may_dispatch_ahead or self._gaps.is_wanted or self._snapshots.seconds_until_due() == 0:
            return
        calls = self._add(self._scheduler.take_tick())
        if len(calls) != 1 or not calls[0].passes or not calls[0].optim_steps:
            return
        runs = calls[0].runs
        if runs.keys() & in_flight.call.runs.keys() or not self._residency.claim(runs):
            return
        try:
            self._in_flight = self._dispatch(calls[0])
        except Exception:  # it fails again in its turn, and its clients get the error then
            log.exception("a call could not be dispatched ahead; it waits for its turn")

    def _drop_in_flight(self) -> None:
        """Drop the result; the call itself is still queued."""
        if self._in_flight is not None:
            self._in_flight.drop()
            self._in_flight = None

    # ------------------------------------------------------------ what came of a call

    def _pack(self, passes: Sequence[Job]) -> Packed:
        info = self._worker.info
        return self.tally.packed(pack(passes, info), info)

    def _trained(
        self,
        passes: Sequence[Job] = (),
        outputs: Sequence[ForwardBackwardOutput] = (),
        steps: Sequence[Job] = (),
        outcomes: Sequence[StepOutcome] = (),
    ) -> None:
        """Passes, and the steps after them, have been computed."""
        changed = [job for job in passes if not pass_of(job).forward_only]
        self._snapshots.computed(changed, steps)
        results: list[tuple[str, Outcome]] = []
        results += [(job.request_id, output) for job, output in zip(passes, outputs, strict=True)]
        results += [(job.request_id, step_result(each)) for job, each in zip(steps, outcomes, strict=True)]
        new = self._futures.complete_together(results)
        for job in passes:
            if job.request_id in new:
                tokens = sum(len(datum.model_input.tokens) for datum in pass_of(job).data)
                self._ledger.record(job.run.tenant, job.run.session_id, "training", tokens)

    async def _after_failure(self, call: Call, error: Exception) -> list[Call]:
        """A call failed without changing anything: returns what to try instead, so that only the job at fault fails."""
        if len(call.jobs) > 1:
            log.warning("a call of %d jobs failed as a whole; it is made in parts: %s", len(call.jobs), error)
            return call.smaller()
        job = call.only_job
        run_id = job.run.run_id
        if not call.is_repeat:
            doing = f"{type(job.request).__name__} {job.seq_id} of {run_id}"
            self._futures.complete(job.request_id, to_failure(error, doing))
            return []
        log.error("what run %s had computed could not be computed again", run_id, exc_info=error)
        if self._give_up(job.run):
            await self._worker.remove_adapter(run_id)
        return [call]  # it is skipped, with all else of the run that was to be repeated

    # ------------------------------------------------------------ after a loss

    def _after_loss(self, call: Call) -> list[Call]:
        """The worker was lost during a call: returns what to try once it is back."""
        if call.is_repeat:
            if not self._calls.is_too_much(call):
                return [call]
            if len(call.jobs) > 1:
                return call.singles()
            self._give_up(call.only_job.run)
            return [call]
        if not call.was_lost:
            return call.singles(was_lost=True)
        # It was alone, and in flight at both losses.
        job = call.only_job
        job.run.reading = None
        self._futures.complete(job.request_id, m.Failure(error=ENDED_TWICE, category="server"))
        return []

    def _give_up(self, run: Run) -> bool:
        """A run's state is lost: all requests to it fail. Returns whether its adapter is on the worker."""
        run.lost = run.lost or NOT_REPEATED
        self._snapshots.drop(run)
        return self._residency.drop(run, RunState.LOST)

    async def _recover(self, loss: WorkerLost) -> None:
        """Bring the worker back; then have computed again what was lost."""
        self._drop_in_flight()
        try:
            await recover(loss, self._worker, self._residency, self._sampler_adapters)
        except Exception as error:
            log.error("The model could not be restarted: %s", error)
            self._has_failed = True
            self._worker.give_up()
            self._fail(self._calls.take_all())
        else:
            self._calls.repeat(self._snapshots.take_unsaved())

    def _fail(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._futures.complete(job.request_id, m.Failure(error=NOT_BACK, category="server"))
