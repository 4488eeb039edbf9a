"""The loop that does the work: `step` is the architecture in a dozen lines."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, RowResult, StepOutcome
from twinkle.server.engine.adapters import AdapterJobs, ReadCheckpoint
from twinkle.server.engine.ahead import Begun, Pace
from twinkle.server.engine.failures import StepRefused, to_failure
from twinkle.server.engine.packing import Packed, pack, unpack
from twinkle.server.engine.recovery import Recovery
from twinkle.server.engine.residency import Residency
from twinkle.server.engine.snapshots import Snapshots
from twinkle.server.engine.worker import WorkerLost, WorkerPort
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.jobs import Job, Tick
from twinkle.server.scheduling.scheduler import Scheduler

log = logging.getLogger("twinkle.engine")

_ENDED_TWICE = (
    "the process that held the model ended while it computed this request, and ended again when the request was tried "
    "once more: don't send it again as it is; the server's log has what is known of the cause"
)
_NOT_BACK = (
    "the process that held the model ended and could not be started anew; this request was not computed: the server's "
    "log has the cause"
)
_NOT_REPEATED = (
    "the state of this run is lost: the process that held the model ended, and what the run had computed could not be "
    "computed again; begin a new run from its last checkpoint"
)

# What is computed again after a loss, and ends the process each time, is given up after so many times.
_MAX_REPEATS = 3


class Engine:
    """Takes ticks from the scheduler, runs them on the worker, completes their futures; one tick at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        futures: FutureTable,
        worker: WorkerPort,
        adapters: AdapterJobs,
        snapshots: Snapshots,
        residency: Residency,
        recovery: Recovery,
        record_pass: Callable[[Job], None],
    ) -> None:
        """
        Args:
            record_pass: told of each training pass that has been computed.
        """
        self._scheduler = scheduler
        self._futures = futures
        self._worker = worker
        self._adapters = adapters
        self._snapshots = snapshots
        self._residency = residency
        self._recovery = recovery
        self._record_pass = record_pass
        # What is under way: jobs leave it as they are done with. It may be one of the parts of a scheduler's tick, of
        # which the others wait.
        self._tick = Tick([], [], [])
        self._waiting: list[Tick] = []
        # The first of those that wait, if it has been sent already.
        self._ahead: Begun | None = None
        self._pace = Pace()
        self._may_look_ahead = True
        self._is_repeated = False
        # Calls that are to be made again, before all else, and how often a job in them has ended the process.
        self._repeat: deque[list[Job]] = deque()
        self._losses: Counter[str] = Counter()
        # By request: checkpoints that are being read, or have been, for loads that are held until then.
        self._reading: dict[str, asyncio.Task[ReadCheckpoint]] = {}
        self._idle = asyncio.Event()
        self._has_failed = False

    @property
    def has_failed(self) -> bool:
        """Whether the worker was lost and could not be started anew, so that every job fails."""
        return self._has_failed

    def repeat(self, calls: Iterable[list[Job]]) -> None:
        """Make these calls first of all: an earlier engine made them, and they are in no run's copy."""
        self._repeat.extend(calls)

    async def run(self) -> None:
        """Step for ever; cancelled from outside."""
        try:
            while not self._has_failed:
                try:
                    await self.step()
                except WorkerLost as loss:
                    await self._recover(loss)
            while True:
                self._fail_all(await self._scheduler.next_tick())
        finally:
            self._drop_ahead()
            for reading in self._reading.values():
                reading.cancel()

    async def step(self) -> None:
        self._idle.clear()
        await self._catch_up()
        tick = await self._next_tick()
        if tick.passes and tick.optim_steps and not self._is_repeated:
            await self._train(tick)
        await self._together(tick.passes, self._run_passes)
        await self._together(tick.optim_steps, self._run_optim_steps)
        await self._one_by_one(tick.others, self._run_or_put_off)

    async def between_ticks(self) -> None:
        """Returns when nothing is being computed, until the loop goes on. From now on no tick is sent ahead."""
        self._may_look_ahead = False
        await self._idle.wait()

    async def _next_tick(self) -> Tick:
        """What a loss of the worker left undone, or else what comes next; snapshots are taken in between.

        Raises:
            WorkerLost: if it is lost meanwhile.
        """
        if not self._tick.jobs:
            self._is_repeated = False
            if self._ahead is None:  # a copy would have what has been sent
                await self._snapshots.take_due()
            if not self._waiting:
                self._waiting = self._parts(await self._wait_for_tick())
            self._tick = self._waiting.pop(0) if self._waiting else Tick([], [], [])
        self._residency.expect(self._tick)
        return self._tick

    def _parts(self, tick: Tick) -> list[Tick]:
        """What is run one after the other."""
        return [part for half in tick.quick_first() for part in self._residency.split(half)]

    async def _wait_for_tick(self) -> Tick:
        """A tick, or an empty one when a snapshot is due."""
        ready = asyncio.ensure_future(self._scheduler.next_tick())
        lost = asyncio.ensure_future(self._worker.lost())
        try:
            timeout = self._snapshots.seconds_until_due()
            self._idle.set()
            await asyncio.wait({ready, lost}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._idle.clear()
            if ready.done():  # its jobs are in no queue any more: they come before everything else
                return ready.result()
            if lost.done():
                raise lost.result()
            return Tick([], [], [])
        finally:
            ready.cancel()
            lost.cancel()

    async def _train(self, tick: Tick) -> None:
        """Passes and the steps behind them in one call, as far as that goes; what is left is in the tick still."""
        begun, self._ahead = self._ahead, None
        try:
            begun = begun or await self._begin(tick)
            looking = asyncio.create_task(self._look_ahead(begun))
            try:
                results, metrics = await begun.call
            finally:
                looking.cancel()
        except WorkerLost:
            raise
        except Exception:  # nothing has changed, and it comes again where it belongs
            await self._one_by_one(tick.passes, self._run_passes)
            return
        self._pace.ended(begun, asyncio.get_running_loop().time())
        self._passes_done(tick.passes, begun.packed, results)
        tick.passes.clear()
        if metrics is not None:
            self._optim_steps_done(tick.optim_steps, metrics)
            tick.optim_steps.clear()

    async def _begin(self, tick: Tick) -> Begun:
        packed = await self._pack(tick.passes)
        call = asyncio.create_task(self._worker.train(packed.micro_batches, _steps(tick.optim_steps)))
        cost = sum(len(rows) * max(len(row.tokens) for row in rows) for rows in packed.micro_batches)
        cost += len(packed.micro_batches) * self._worker.info.overhead_tokens
        return Begun(tick, packed, call, asyncio.get_running_loop().time(), cost)

    async def _look_ahead(self, begun: Begun) -> None:
        """Late in a tick, take the next one if it is complete, and send it if nothing comes between the two.

        Its runs are others than this one's, so neither depends on what becomes of the other.
        """
        late_at = self._pace.late_at(begun)
        if late_at is None or self._waiting or self._repeat or begun.tick.others:
            return
        under_way = {job.run_id for job in begun.tick.jobs}
        await asyncio.sleep(late_at - asyncio.get_running_loop().time())
        await self._scheduler.complete_beside(under_way)
        if not self._may_look_ahead or self._snapshots.seconds_until_due() == 0:
            return
        # From here to its end nothing else runs: no call is waited for.
        self._waiting = self._parts(self._scheduler.take_tick())
        if not self._waiting:
            return
        tick = self._waiting[0]
        runs = {job.run_id for job in tick.jobs}
        if (
            tick.passes
            and tick.optim_steps
            and not tick.others
            and not runs & under_way
            and self._residency.has(runs)
        ):
            try:
                self._ahead = await self._begin(tick)
            except Exception:  # it comes again when the tick's turn has come, and is told to whom it concerns
                log.exception("a tick could not be sent ahead; it waits for its turn")

    def _drop_ahead(self) -> None:
        """Nobody asks any more what becomes of what has been sent ahead; the tick waits still."""
        if self._ahead is not None:
            self._ahead.call.cancel()
            self._ahead.call.add_done_callback(lambda call: call.cancelled() or call.exception())
            self._ahead = None

    async def _together(self, jobs: list[Job], run: Callable[[list[Job]], Awaitable[None]]) -> None:
        """Run the jobs as one. If that fails nothing has changed, so each is run alone: only the one at fault fails."""
        if len(jobs) > 1 and not self._is_repeated:
            try:
                await run(jobs)
            except WorkerLost:
                raise
            except Exception:
                pass  # it comes again where it belongs
            else:
                jobs.clear()
        await self._one_by_one(jobs, run)

    async def _one_by_one(self, jobs: list[Job], run: Callable[[list[Job]], Awaitable[None]]) -> None:
        while jobs:
            job = jobs[0]
            try:
                await run([job])
            except WorkerLost:
                if self._is_repeated:  # it was alone, and has been under way each time
                    self._futures.complete(job.request_id, m.Failure(error=_ENDED_TWICE, category="server"))
                    self._reading.pop(job.request_id, None)
                    jobs.remove(job)
                raise
            except Exception as error:
                doing = f"{type(job.request).__name__} {job.seq_id} of {job.run_id}"
                self._futures.complete(job.request_id, to_failure(error, doing))
            jobs.remove(job)

    # ------------------------------------------------------------ after a loss

    async def _recover(self, loss: WorkerLost) -> None:
        """Bring the worker back; what was lost is then computed again, and what was under way run again, each job
        alone, in case one of them ended it.
        """
        self._is_repeated = True
        self._drop_ahead()
        try:
            await self._recovery.recover(loss)
        except Exception as error:
            log.error("The model could not be started anew: %s", error)
            self._has_failed = True
            for tick in (self._tick, *self._waiting):
                self._fail_all(tick)
        self._repeat.extendleft(reversed(self._snapshots.history.take_all()))

    async def _catch_up(self) -> None:
        """Make the calls again that no copy has."""
        if self._repeat:
            log.info("%d calls are made again, which are in no copy of their runs", len(self._repeat))
        while self._repeat:
            call = self._repeat[0]
            try:
                await self._make_again(call)
            except WorkerLost:
                self._losses.update(job.request_id for job in call)
                if call and self._losses[call[0].request_id] >= _MAX_REPEATS:
                    self._doubt(call)
                raise
            self._repeat.popleft()
        self._losses.clear()

    async def _make_again(self, call: list[Job]) -> None:
        """Jobs that have been done leave the call, should it have to be made once more."""
        try:
            if call:
                await self._run_alike(call)
        except WorkerLost:
            raise
        except Exception:
            while call:  # only those whose copies can't be read fail
                job = call[0]
                try:
                    await self._run_alike([job])
                except WorkerLost:
                    raise
                except Exception as error:
                    log.exception(
                        "what run %s had computed could not be computed again: %s", job.run_id, error
                    )
                    self._give_up(job)
                    await self._residency.give_up(job.run_id)
                else:
                    call.remove(job)

    def _doubt(self, call: list[Job]) -> None:
        """The call has ended the process each time: its jobs are tried alone, or the only one is given up."""
        for job in call:
            del self._losses[job.request_id]
        if len(call) == 1:
            self._give_up(call[0])
            return
        self._repeat.popleft()
        self._repeat.extendleft([job] for job in reversed(call))

    async def _run_alike(self, jobs: list[Job]) -> None:
        match jobs[0].request:
            case m.ForwardBackwardRequest():
                await self._run_passes(jobs)
            case m.OptimStepRequest():
                await self._run_optim_steps(jobs)
            case _:
                await self._run_other(jobs)

    def _give_up(self, job: Job) -> None:
        """A run's state is lost: all that is asked of it fails."""
        self._snapshots.give_up(job.run_id, _NOT_REPEATED)
        self._futures.complete(job.request_id, m.Failure(error=_NOT_REPEATED, category="server"))
        for call in self._repeat:
            call[:] = [other for other in call if other.run_id != job.run_id]

    def _fail_all(self, tick: Tick) -> None:
        for job in tick.jobs:
            self._futures.complete(job.request_id, m.Failure(error=_NOT_BACK, category="server"))

    # ------------------------------------------------------------ jobs of one kind

    async def _run_passes(self, jobs: list[Job]) -> None:
        packed = await self._pack(jobs)
        results = await self._worker.forward_backward(packed.micro_batches)
        self._passes_done(jobs, packed, results)

    async def _pack(self, jobs: list[Job]) -> Packed:
        """The passes in micro-batches, their adapters on the worker."""
        await self._residency.bring_in((job.run_id for job in jobs), adding_gradients=True)
        return pack(jobs, self._worker.info.max_batch_tokens, self._worker.info.overhead_tokens)

    def _passes_done(self, jobs: list[Job], packed: Packed, results: list[list[RowResult]]) -> None:
        self._snapshots.changed([job for job in jobs if not _is_forward_only(job)], has_gradient=True)
        for job in jobs:
            if self._futures.is_pending(job.request_id):
                self._record_pass(job)
        outputs = unpack(jobs, packed, results)
        self._futures.complete_together(
            (job.request_id, output) for job, output in zip(jobs, outputs, strict=True)
        )

    async def _run_optim_steps(self, jobs: list[Job]) -> None:
        await self._residency.bring_in(job.run_id for job in jobs)
        self._optim_steps_done(jobs, await self._worker.optim_step(_steps(jobs)))

    def _optim_steps_done(self, jobs: list[Job], outcomes: list[StepOutcome]) -> None:
        self._snapshots.changed(jobs, has_gradient=False)  # one that was refused has dropped its gradient
        self._futures.complete_together(
            (job.request_id, _step_result(outcome)) for job, outcome in zip(jobs, outcomes, strict=True)
        )

    async def _run_or_put_off(self, jobs: list[Job]) -> None:
        """A load first has its checkpoint read while the ticks go on: nobody else waits for that."""
        [job] = jobs
        if isinstance(job.request, m.LoadWeightsRequest) and job.request_id not in self._reading:
            self._read_beside(job, job.request)
            return
        is_over = True
        try:
            await self._run_other(jobs)
        except WorkerLost:
            is_over = False
            raise
        finally:
            if is_over:
                self._reading.pop(job.request_id, None)

    def _read_beside(self, job: Job, request: m.LoadWeightsRequest) -> None:
        self._scheduler.hold(job)
        reading = self._reading[job.request_id] = asyncio.create_task(self._adapters.read_for(job, request))

        def give_back(_reading: object) -> None:
            if not self._scheduler.give_back(job):
                del self._reading[job.request_id]

        reading.add_done_callback(give_back)

    async def _run_other(self, jobs: list[Job]) -> None:
        [job] = jobs
        match job.request:
            case m.CreateModelRequest():
                await self._adapters.create(job)
            case m.UnloadModelRequest():
                await self._adapters.unload(job)
            case m.SaveWeightsRequest():
                await self._adapters.save(job, job.request)
            case m.SaveWeightsForSamplerRequest():
                await self._adapters.save_for_sampler(job, job.request)
            case m.SaveWeightsExternalRequest():
                await self._adapters.save_external(job, job.request)
            case m.LoadWeightsRequest():
                reading = self._reading.get(job.request_id) or self._adapters.read_for(job, job.request)
                await self._adapters.load(job, job.request, reading)
            case m.ForwardBackwardRequest() | m.OptimStepRequest():
                raise AssertionError("the scheduler puts these elsewhere")


def _steps(jobs: list[Job]) -> list[AdamStep]:
    return [
        AdamStep(job.run_id, cast(m.OptimStepRequest, job.request).adam_params or AdamParams())
        for job in jobs
    ]


def _step_result(outcome: StepOutcome) -> m.OptimStepResponse | m.Failure:
    if isinstance(outcome, InvalidRequest):
        return StepRefused(error=outcome.message, category=outcome.category)
    return m.OptimStepResponse(metrics=outcome)


def _is_forward_only(job: Job) -> bool:
    return cast(m.ForwardBackwardRequest, job.request).forward_only
