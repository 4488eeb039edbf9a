"""A base model as the engine sees it: `WorkerPort`, all calls to it, and `LocalWorker`, which carries them out.

`LocalWorker` holds both halves of a base model in this process, a training backend and a sampling engine. If the model
has processes of its own, each of them has a `LocalWorker`, and the engine's worker is `serve.ranks`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, cast

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server import plugins
from twinkle.server.backends.determinism import use_deterministic_kernels
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    ModelConfig,
    Row,
    RowResult,
    StepOutcome,
    TrainingBackend,
)
from twinkle.server.samplers.protocol import GenerateRequest, SamplingEngine

P = ParamSpec("P")
R = TypeVar("R")

# Results of a pass, and outcomes of the optimizer steps after it; None if the steps raised: the engine then calls
# `optim_step` separately, which makes them or raises.
Trained: TypeAlias = tuple[list[list[RowResult]], list[StepOutcome] | None]


# Where samples are drawn: beside training, and lost with it; in processes of their own; or nowhere.
SamplerPlace: TypeAlias = Literal["beside training", "apart", "nowhere"]


class WorkerLost(ServerFault):
    """A process that held the base model has ended, hangs, or can't compute any more: its adapters are gone.

    Attributes:
        reason: what happened, for the log.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("the process that held the model ended or hung; the server's log has the cause")
        self.reason = reason


class WorkerPort(Protocol):
    """A base model's process, or group of processes.

    The methods are those of `TrainingBackend` and `SamplingEngine`, and are described there. They raise what the
    backend or engine raised, or `WorkerLost`. `serve.ranks.RankGroup` says which ranks run each of them.
    """

    @property
    def info(self) -> BaseModelInfo: ...

    @property
    def loss_fns(self) -> LossSpecs: ...

    @property
    def samplers(self) -> SamplerPlace: ...

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None: ...

    async def remove_adapter(self, adapter_id: str) -> None: ...

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]: ...

    async def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]: ...

    async def train(self, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]) -> Trained:
        """`forward_backward` followed by `optim_step`, in one round trip.

        Raises:
            Exception: what the pass raised; then no step was made.
        """
        ...

    async def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState: ...

    async def import_adapter(self, adapter_id: str, state: AdapterState) -> None: ...

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None:
        """Hand the trained adapter to the sampler, in memory, as an immutable copy under another id.

        Args:
            state: its export, for samplers that aren't where it is trained.
        """
        ...

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None: ...

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None: ...

    async def generate(self, request: GenerateRequest) -> SampleResponse: ...

    async def cancel(self, request_id: str) -> None:
        """Stop drawing a sample that nobody waits for any more."""
        ...

    async def lost(self) -> WorkerLost:
        """Wait until the worker is lost; returns why."""
        ...

    async def available(self) -> None:
        """Wait until calls are accepted: no time unless the worker is lost.

        Raises:
            ServerFault: if a lost worker could not be restarted.
        """
        ...

    async def restart(self) -> None:
        """Restart a lost worker; it then holds no adapters. Nothing has called it yet when this returns.

        Raises:
            WorkerLost: if it was lost again meanwhile.
            Exception: if it can't be started.
        """
        ...

    def give_up(self) -> None:
        """A lost worker will not be restarted: callers that wait for it get the error."""
        ...

    async def close(self) -> None: ...


def only_trains() -> InvalidRequest:
    """What those are told who want samples of a server without samplers."""
    return InvalidRequest(
        "this server has no samplers: it trains, and saves checkpoints; sample where one of them is loaded, or ask for "
        "samplers in the server's configuration (section 'sampler')"
    )


class LocalSampler:
    """A sampling engine in this process, as its callers in other processes see it."""

    def __init__(self, engine: SamplingEngine) -> None:
        self._engine = engine

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await asyncio.to_thread(self._engine.add_adapter, sampler_adapter_id, state)

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await asyncio.to_thread(self._engine.remove_adapter, sampler_adapter_id)

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        return await asyncio.wrap_future(self._engine.generate(request))

    async def cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)


class LocalWorker:
    """Backend and sampler in this process: training on a thread of its own, sampling on the engine's thread.

    Never lost: it ends with its caller.
    """

    def __init__(self, backend: TrainingBackend, sampler: SamplingEngine | None) -> None:
        """
        Args:
            sampler: None on ranks that only train.
        """
        self._backend = backend
        self._sampler_or_none = LocalSampler(sampler) if sampler is not None else None
        # One thread: a backend takes one call at a time.
        self._training_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training")

    @property
    def info(self) -> BaseModelInfo:
        return self._backend.info

    @property
    def loss_fns(self) -> LossSpecs:
        return self._backend.loss_fns

    @property
    def samplers(self) -> SamplerPlace:
        return "nowhere" if self._sampler_or_none is None else "beside training"

    async def describe(self) -> tuple[BaseModelInfo, LossSpecs]:
        """What the engine needs to know about a model in another process."""
        return self.info, self.loss_fns

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        await self._on_training_thread(self._backend.add_adapter, adapter_id, spec)

    async def owner_of(self, adapter_id: str) -> int:
        """Which of several data-parallel ranks has the adapter's gradient and moments."""
        return cast("Any", self._backend).owner_of(adapter_id)

    async def remove_adapter(self, adapter_id: str) -> None:
        await self._on_training_thread(self._backend.remove_adapter, adapter_id)

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        return await self._on_training_thread(self._backend.forward_backward, micro_batches)

    async def optim_step(self, steps: Sequence[AdamStep]) -> list[StepOutcome]:
        return await self._on_training_thread(self._backend.optim_step, steps)

    async def train(self, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]) -> Trained:
        return await self._on_training_thread(_pass_and_steps, self._backend, micro_batches, steps)

    async def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        export = self._backend.export_adapter
        return await self._on_training_thread(export, adapter_id, with_optimizer, with_gradients)

    async def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        await self._on_training_thread(self._backend.import_adapter, adapter_id, state)

    async def publish(self, adapter_id: str, sampler_adapter_id: str, state: AdapterState) -> None:
        error = await self.try_publish(adapter_id, sampler_adapter_id)
        if error is not None:
            raise error

    async def try_publish(self, adapter_id: str, sampler_adapter_id: str) -> Exception | None:
        """`publish` on one rank: all take part in the export. Returns the error of this rank's sampler, if any."""
        state = await self.export_adapter(adapter_id, with_optimizer=False)
        if self._sampler_or_none is None:
            return None
        try:
            await self.add_sampler_adapter(sampler_adapter_id, state)
        except Exception as error:
            return error
        return None

    async def add_sampler_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        await self._sampler.add_sampler_adapter(sampler_adapter_id, state)

    async def remove_sampler_adapter(self, sampler_adapter_id: str) -> None:
        await self._sampler.remove_sampler_adapter(sampler_adapter_id)

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        return await self._sampler.generate(request)

    async def cancel(self, request_id: str) -> None:
        await self._sampler.cancel(request_id)

    async def lost(self) -> WorkerLost:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def available(self) -> None:
        """Returns at once."""

    async def restart(self) -> None:
        raise AssertionError("a worker in this process is never lost")

    def give_up(self) -> None:
        raise AssertionError("a worker in this process is never lost")

    async def close(self) -> None:
        if self._sampler_or_none is not None:
            await self._sampler_or_none.close()
        await self._on_training_thread(self._backend.close)
        self._training_thread.shutdown()

    @property
    def _sampler(self) -> LocalSampler:
        if self._sampler_or_none is None:
            raise only_trains()
        return self._sampler_or_none

    async def _on_training_thread(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        call = partial(method, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._training_thread, call)


def _pass_and_steps(
    backend: TrainingBackend, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]
) -> Trained:
    results = backend.forward_backward(micro_batches)
    try:
        return results, backend.optim_step(steps)
    except Exception:
        # The pass stays done; the engine calls the steps separately and gets the error there.
        return results, None


def build_worker(model: ModelConfig, backend: str, sampler: str | None) -> LocalWorker:
    """Backend and sampling engine of one rank, in this process; they share the base weights if they can."""
    use_deterministic_kernels(model)
    backend_class: type[TrainingBackend] = plugins.find(plugins.TRAINING_BACKENDS, backend)
    if sampler is None:
        return LocalWorker(backend_class(replace(model, samples=False)), None)
    sampler_class: type[SamplingEngine] = plugins.find(plugins.SAMPLING_ENGINES, sampler)
    training = backend_class(model)
    return LocalWorker(training, sampler_class.create(model, training))


def build_sampler(model: ModelConfig, engine: str) -> LocalSampler:
    """A sampling engine with a model of its own, in this process, where nothing trains."""
    use_deterministic_kernels(model)
    engine_class: type[SamplingEngine] = plugins.find(plugins.SAMPLING_ENGINES, engine)
    return LocalSampler(engine_class.create(model, None))
