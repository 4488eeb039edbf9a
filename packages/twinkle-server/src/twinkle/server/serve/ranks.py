"""The rank processes behind one `WorkerPort`: which ranks run which verb, agreement between ranks, restarts.

A rank is a Ray actor (`rank.py`) that answers calls to its `LocalWorker` over an RPC connection of its own (`rpc.py`).
A group's ranks occupy the bundles of one placement group.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from twinkle.protocol.errors import InvalidRequest, ServerFault, TwinkleError
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    Row,
    RowResult,
)
from twinkle.server.backends.shares import RankShares
from twinkle.server.engine.shape_check import AdapterShape, ProvenShapes
from twinkle.server.engine.worker import SamplerPlace, Trained, WorkerLost, WorkerPort
from twinkle.server.plan import Plan
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.serve.ended import PROCESS_ENDED, is_beyond_repair
from twinkle.server.serve.rank import Rank
from twinkle.server.serve.rpc import Call, Connection, ConnectionLost
from twinkle.server.serve.sampler_pool import SamplerPool
from twinkle.server.serve.samplers import NoSamplers, RankSamplers, Samplers

P = ParamSpec("P")
R = TypeVar("R")

# How long to wait for the other ranks after one has failed.
GRACE_SECONDS = 10.0


# ---------------------------------------------------------------- which ranks run a verb


def _on_all_ranks(
    verb: Callable[Concatenate[WorkerPort, P], CoroutineType[Any, Any, R]],
) -> Callable[Concatenate[RankGroup, P], CoroutineType[Any, Any, R]]:
    """Every rank runs it, with the same arguments; rank 0 returns for the group."""

    async def call(group: RankGroup, *args: P.args, **kwargs: P.kwargs) -> R:
        return await group.incarnation.all_ranks(verb.__name__, *args, **kwargs)

    return call


class RankGroup:
    """A `WorkerPort` over the ranks' processes.

    Attributes:
        incarnation: the processes that run now, or ran last.
        info, loss_fns: of their model.
    """

    # Which ranks run each verb. What a rank does with it depends on its role, which the plan decides.
    optim_step = _on_all_ranks(WorkerPort.optim_step)
    export_adapter = _on_all_ranks(WorkerPort.export_adapter)
    import_adapter = _on_all_ranks(WorkerPort.import_adapter)

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        await self.incarnation.all_ranks("add_adapter", adapter_id, spec)
        if self._plan.shares_rows:
            [self._owners[adapter_id]] = await self.incarnation.these_ranks([0], "owner_of", adapter_id)

    async def remove_adapter(self, adapter_id: str) -> None:
        self._owners.pop(adapter_id, None)
        await self.incarnation.all_ranks("remove_adapter", adapter_id)

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        verb, num_ranks = "forward_backward", self.incarnation.num_ranks
        if not self._plan.shares_rows:
            return await self.incarnation.all_ranks(verb, micro_batches)
        info = self.info
        shares = RankShares.of(
            micro_batches, num_ranks, info.overhead_tokens, self._owners, packs=info.packs_rows
        )
        by_rank = await self.incarnation.each_rank(verb, [(share,) for share in shares.of_ranks])
        return shares.put_together(by_rank)

    async def train(self, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]) -> Trained:
        if self.incarnation.num_ranks == 1:
            return await self.incarnation.all_ranks("train", micro_batches, steps)
        # Two calls, so that the ranks agree on the pass before the steps.
        async with self._training:
            results = await self.forward_backward(micro_batches)
            try:
                return results, await self.optim_step(steps)
            except WorkerLost:
                raise
            except Exception:
                # The pass stays done; the engine calls the steps separately and gets the error there.
                return results, None

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._samplers.publish(adapter_id, sampler_adapter_id, state)
        await self._check_shape(sampler_adapter_id, state)

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._samplers.add_adapter(sampler_adapter_id, state)
        await self._check_shape(sampler_adapter_id, state)

    async def _check_shape(self, sampler_adapter_id: str, state: AdapterState) -> None:
        """Compare a foreign engine with the trainer if it has not been seen to compute adapters of this shape right.

        Raises:
            ServerFault: if it doesn't; the adapter is then not published.
        """
        shape = AdapterShape.of(state)
        if self._proven is None or self._proven.has(shape):
            return
        # A copy in the trainer: the run's own adapter may be away, and one from a checkpoint has none there.
        copy = f"check of {sampler_adapter_id}"
        try:
            await self.add_adapter(copy, state.spec)
            try:
                await self.import_adapter(copy, replace(state, optimizer=None, gradients=None))
            except InvalidRequest:
                pass  # it comes from elsewhere, and acts on layers that aren't trained here
            else:
                await self._proven.check(shape, self, copy, self, sampler_adapter_id)
            finally:
                with contextlib.suppress(WorkerLost):
                    await self.remove_adapter(copy)
        except BaseException:
            await self._samplers.remove_adapter(sampler_adapter_id)
            raise

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await self._samplers.remove_adapter(sampler_adapter_id)

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        return await self._samplers.generate(request)

    async def cancel(self, request_id: str) -> None:
        await self._samplers.cancel(request_id)

    @property
    def samplers(self) -> SamplerPlace:
        return self._samplers.place

    # ------------------------------------------------------------ incarnations

    def __init__(
        self,
        plan: Plan,
        placement: PlacementGroup,
        incarnation: Incarnation,
        info: BaseModelInfo,
        loss_fns: LossSpecs,
        samplers: Samplers | None = None,
    ) -> None:
        """
        Args:
            samplers: those with processes of their own.
        """
        self.incarnation, self.info, self.loss_fns = incarnation, info, loss_fns
        on_ranks = RankSamplers(self, plan.sampler_ranks) if plan.sampler_ranks else NoSamplers()
        self._samplers: Samplers = samplers or on_ranks
        is_foreign = plan.samplers is not None and plan.samplers.engine != plan.backend
        self._proven = ProvenShapes(plan.model.torch_dtype, info.vocab_size) if is_foreign else None
        self._owners: dict[str, int] = {}  # by adapter: see `RankShares`
        self._plan = plan
        self._placement = placement
        self._is_given_up = False
        self._training = asyncio.Lock()
        self._restarted = asyncio.Event()  # set and replaced by each restart, and by `give_up`

    @classmethod
    async def start(
        cls, plan: Plan, placement: PlacementGroup, first: Sequence[Any] | None = None
    ) -> RankGroup:
        """Start one actor on each bundle of `placement`, a rank or a sampler of its own.

        Args:
            first: existing actors, used unless another group has them.

        Raises:
            Exception: what ranks or samplers raised when they loaded the model.
            ServerFault: if one of them ended, or only some ranks could load it.
        """
        pool = None
        if plan.samplers is not None and plan.samplers.processes:
            pool = asyncio.create_task(SamplerPool.start(plan, placement))
        incarnation = None
        try:
            incarnation, info, loss_fns = await _start(plan, placement, first)
            return cls(plan, placement, incarnation, info, loss_fns, await pool if pool else None)
        except BaseException as error:
            if incarnation is not None:
                incarnation.end()
            if pool is not None:
                pool.cancel()
                [started] = await asyncio.gather(pool, return_exceptions=True)
                if isinstance(started, SamplerPool):
                    started.end()
            if isinstance(error, WorkerLost):
                said = f"the model's process was lost while it started ({error.reason})"
                raise ServerFault(said) from error
            raise

    async def lost(self) -> WorkerLost:
        return await self.incarnation.lost()

    async def available(self) -> None:
        while self.incarnation.is_lost and not self._is_given_up:
            await self._restarted.wait()
        if self._is_given_up:
            raise ServerFault("the model's process could not be restarted: see the server's log")

    async def restart(self) -> None:
        self.incarnation.end()
        self.incarnation, self.info, self.loss_fns = await _start(self._plan, self._placement)
        self._wake_waiting()

    def give_up(self) -> None:
        self._is_given_up = True
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        restarted, self._restarted = self._restarted, asyncio.Event()
        restarted.set()

    async def close(self) -> None:
        await self._samplers.close()
        await self.incarnation.close()


# ---------------------------------------------------------------- one incarnation


class Incarnation:
    """The ranks' processes from one start until one of them is lost. Single-threaded: used on one event loop.

    They live and die together, since each holds a part of what the others need. Calls to all ranks are made one at a
    time, so that all ranks run the same calls in the same order. The group is lost when a process ends or hangs, when
    its ranks don't agree on what happened, and when a device can't compute any more.
    """

    def __init__(
        self, connections: Sequence[Connection], actors: Sequence[Any], call_timeout: float | None
    ) -> None:
        """
        Args:
            connections: to the ranks, rank 0 first.
            actors: the Ray actors behind them.
            call_timeout: seconds without an answer to a call to all ranks after which the group is lost; None: never.
        """
        self._connections = connections
        self._actors = actors
        self._call_timeout = call_timeout
        self._lost: asyncio.Future[WorkerLost] = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Lock()
        self._answered_at = 0.0  # the event loop's time when all ranks last answered
        self._watches = [asyncio.create_task(self._watch(rank)) for rank in range(len(connections))]

    @property
    def num_ranks(self) -> int:
        return len(self._connections)

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def lost(self) -> WorkerLost:
        """Wait until the group is lost; returns why."""
        return await asyncio.shield(self._lost)

    async def describe(self) -> tuple[BaseModelInfo, LossSpecs]:
        """Facts about the model, once it is loaded, however long that takes.

        Raises:
            WorkerLost: if the group is lost.
            Exception: what all ranks raised.
        """
        [described, *_] = await self._run([Call("describe")] * self.num_ranks, None)
        return described

    async def all_ranks(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        """Rank 0's result.

        Raises:
            WorkerLost: if the group is lost.
            Exception: what all ranks raised.
        """
        # The other ranks' results are the same, so they aren't sent.
        calls = [Call(verb, args, kwargs)] * self.num_ranks
        [result, *_] = await self._run(calls, self._call_timeout, wanted=1)
        return result

    async def each_rank(self, verb: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call each rank with its own arguments; returns each one's result.

        Raises:
            WorkerLost, Exception: as `all_ranks`.
        """
        calls = [Call(verb, own) for own in args]
        return await self._run(calls, self._call_timeout, wanted=self.num_ranks)

    async def these_ranks(self, ranks: Sequence[int], verb: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The results of some ranks, which need not agree.

        Raises:
            WorkerLost: if the group is lost, or a rank can't compute any more.
            Exception: what else one of them raised.
        """
        self._check()
        call = Call(verb, args, kwargs)
        answers = [self._connections[rank].call(call) for rank in ranks]
        return await asyncio.gather(*map(self._checked, ranks, repeat(verb), answers))

    async def _checked(self, rank: int, verb: str, answer: asyncio.Future[Any]) -> Any:
        try:
            return await answer
        except ConnectionLost as error:
            raise self._lose(f"rank {rank}: {error}") from error
        except Exception as error:
            self.check_device(verb, rank, error)
            raise

    def check_device(self, verb: str, rank: int, error: Exception) -> None:
        """
        Args:
            error: from the rank's sampler.

        Raises:
            WorkerLost: if its process can't compute any more: it can't train on that device either.
        """
        if is_beyond_repair(error):
            raise self._lose(f"{verb}: rank {rank} failed with {type(error).__name__}: {error}") from error

    def end(self) -> None:
        """Kill the processes."""
        for watch in self._watches:
            watch.cancel()
        self._lose("it was shut down")
        for actor in self._actors:
            ray.kill(actor)

    async def close(self) -> None:
        """Let the ranks close what they hold; the processes end with the cluster."""
        for watch in self._watches:
            watch.cancel()
        if not self.is_lost:
            await self.all_ranks("close")

    # ------------------------------------------------------------ calls

    async def _run(self, calls: Sequence[Call], timeout: float | None, wanted: int = 1) -> list[Any]:
        """Make one call to each rank; returns the results of the first `wanted` ones, and None for the others."""
        # A single process takes its calls in order; several might take them in different orders.
        async with self._turn if self.num_ranks > 1 else contextlib.nullcontext():
            self._check()
            answers = await self._ask(calls, timeout, wanted)
            self._check()
            self._answered_at = asyncio.get_running_loop().time()
            return self._agreed(calls[0].method, answers)

    async def _ask(
        self, calls: Sequence[Call], timeout: float | None, wanted: int
    ) -> list[asyncio.Future[Any]]:
        """The ranks' answers, once all are there or the grace period after a failure is over.

        The group is lost if some are missing after `timeout` seconds.
        """
        answers = [
            connection.call(call, wants_result=rank < wanted)
            for rank, (connection, call) in enumerate(zip(self._connections, calls, strict=True))
        ]
        loop = asyncio.get_running_loop()
        sent_at, remaining = loop.time(), timeout
        while True:
            done, waiting = await asyncio.wait(answers, timeout=remaining, return_when="FIRST_EXCEPTION")
            if any(answer.exception() for answer in done):
                # The others fail too, or wait for it in vain. If the group is lost, this returns at once.
                await asyncio.wait(answers, timeout=GRACE_SECONDS)
                break
            if not waiting or timeout is None:
                break
            # A lone rank may have been sent calls before this one: time counts from its last answer to any.
            remaining = max(sent_at, self._answered_at) + timeout - loop.time()
            if remaining <= 0:
                said = f"{_outcomes(answers)} within {timeout:g} s (model.call_timeout_seconds)"
                self._lose(f"{calls[0].method}: {said}")
                break
        return answers

    async def _watch(self, rank: int) -> None:
        self._lose(f"rank {rank}: {await self._connections[rank].lost()}")

    def _check(self) -> None:
        if self._lost.done():
            raise self._lost.result()

    def _lose(self, reason: str) -> WorkerLost:
        """The group is lost, and all calls to it fail; the first reason counts."""
        if not self._lost.done():
            self._lost.set_result(WorkerLost(reason))
            for connection in self._connections:
                connection.close()
        return self._lost.result()

    # ------------------------------------------------------------ agreement

    def _agreed(self, verb: str, answers: Sequence[asyncio.Future[Any]]) -> list[Any]:
        """The ranks' results, or what all of them raised.

        Raises:
            WorkerLost: if they don't agree: their adapters may differ now.
        """
        errors = [answer.exception() if answer.done() else None for answer in answers]
        for rank, error in enumerate(errors):
            if isinstance(error, ConnectionLost):
                raise self._lose(f"rank {rank}: {error}") from error
        if all(answer.done() for answer in answers) and not any(errors):
            return [answer.result() for answer in answers]
        raised = [error for error in errors if error is not None]
        first = next((error for error in raised if isinstance(error, TwinkleError)), raised[0])
        if len({type(error) for error in errors}) == 1 and not is_beyond_repair(first):
            raise first
        raise self._lose(f"{verb}: {_outcomes(answers)}") from first


def _outcomes(answers: Sequence[asyncio.Future[Any]]) -> str:
    def outcome(answer: asyncio.Future[Any]) -> str:
        if not answer.done():
            return "didn't answer"
        error = answer.exception()
        return "succeeded" if error is None else f"failed with {type(error).__name__}: {error}"

    return ", ".join(f"rank {rank} {outcome(answer)}" for rank, answer in enumerate(answers))


# ---------------------------------------------------------------- starting


async def _start(
    plan: Plan, placement: PlacementGroup, first: Sequence[Any] | None = None
) -> tuple[Incarnation, BaseModelInfo, LossSpecs]:
    """Start ranks and load the model; none is left running if that fails.

    Raises:
        Exception: what the ranks raised; if some raised and others didn't, the error meant for users.
        WorkerLost: if there is none, or a process ended.
    """
    incarnation = None
    if first is not None:
        with contextlib.suppress(WorkerLost):  # they have ended or are taken: new ones will do
            incarnation = await _connect(plan, first)
    incarnation = incarnation or await _connect(plan, place_ranks(plan, placement))
    try:
        return incarnation, *await incarnation.describe()
    except BaseException as error:
        incarnation.end()
        if isinstance(error, WorkerLost) and isinstance(error.__cause__, TwinkleError):
            raise error.__cause__ from error
        raise


async def _connect(plan: Plan, actors: Sequence[Any]) -> Incarnation:
    """Connect to actors and have them load the model; if one can't be reached, all are killed.

    Raises:
        WorkerLost: if one of them ended, or is another group's.
    """
    node = ray.get_runtime_context().get_node_id()
    heartbeat_seconds = plan.config.model.heartbeat_timeout_seconds
    try:
        meeting = None
        if len(actors) > 1:
            machines = await asyncio.gather(*(actor.node.remote() for actor in actors))
            meeting = await actors[0].find_rendezvous.remote(is_one_machine=len(set(machines)) == 1)
        model_id = plan.config.model.model_id if plan.joins_cluster else None
        interface = plan.config.ray.network_interface
        configs = [replace(plan.model, rank=rank, rendezvous=meeting) for rank in range(len(actors))]
        serving = [
            actor.serve.remote(node, config, plan.backend, plan.sampler_of(config.rank), model_id, interface)
            for actor, config in zip(actors, configs, strict=True)
        ]
        addresses = await asyncio.gather(*serving)
        if None in addresses:
            raise WorkerLost("another engine has its ranks")
        connections = [await Connection.connect(address, heartbeat_seconds) for address in addresses]
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        if isinstance(error, (*PROCESS_ENDED, OSError)):
            raise WorkerLost(f"a process ended while it started: {error}") from error
        raise
    return Incarnation(connections, actors, plan.call_timeout_seconds)


def place_ranks(plan: Plan, placement: PlacementGroup) -> list[Any]:
    """New actors on their bundles, which import what they will need right away."""
    actor_class = cast(Any, ray.remote)(Rank)
    actors: list[Any] = []
    for rank in range(plan.num_ranks):
        bundle = plan.bundle_of_rank(rank)
        place = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle)
        options = {"num_cpus": 1, "num_gpus": plan.gpus_per_rank, "scheduling_strategy": place}
        actors.append(actor_class.options(**options).remote())
        actors[-1].preload.remote(plan.model, plan.backend, plan.sampler_of(rank))
    return actors
