"""The vLLM engine: adapters by id, requests in, futures out, on the event loop of a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault, words_of
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend
from twinkle.server.samplers.protocol import EngineDied, GenerateRequest
from twinkle.server.samplers.stops import load_tokenizer
from twinkle.server.samplers.vllm import adapters, launch
from twinkle.server.samplers.vllm.adapters import AdapterFiles
from twinkle.server.samplers.vllm.api import VllmApi, load
from twinkle.server.samplers.vllm.loop import DIED, SamplingLoop
from twinkle.server.samplers.vllm.requests import LoadedAdapter, Task, make_task
from twinkle.server.samplers.vllm.served import ServedModel, served_model

R = TypeVar("R")

# How often it is looked whether vLLM's process is still there while it is waited for.
_LOOK_SECONDS = 1.0


class VllmEngine:
    """See `twinkle.server.samplers.protocol.SamplingEngine`.

    Seeds: the same request gives the same samples again with this engine; another engine draws others. If vLLM's
    process ends, every request fails with `EngineDied`: make a new engine.
    """

    def __init__(self, config: ModelConfig) -> None:
        """
        Raises:
            InvalidRequest: if vLLM is missing, or can't serve the model.
        """
        launch.set_environment(config)
        self._api: VllmApi = load()
        self._config = config
        self._model: ServedModel = served_model(config)
        self._tokenizer = load_tokenizer(config.path)
        self._files = AdapterFiles.make()
        self._numbers = itertools.count(1)
        # Guards what follows, which callers' threads use.
        self._lock = threading.Lock()
        self._adapters: dict[str, LoadedAdapter] = {}
        self._is_closed = False
        self._loading = threading.Lock()  # one adapter at a time
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._vllm = self._wait_for(launch.start(self._api, config, self._model))
        except BaseException:
            self._stop()
            raise
        self._loop = SamplingLoop(self._api, self._vllm, self._model, self._tokenizer, self._done)

    @classmethod
    def create(cls, config: ModelConfig, backend: TrainingBackend | None) -> Self:
        """An engine for the base model of `config`. vLLM has weights of its own, whatever trains beside it."""
        return cls(config)

    def resident_adapters(self) -> list[str]:
        """Ids of the adapters that can be sampled from."""
        with self._lock:
            return list(self._adapters)

    def add_adapter(self, adapter_id: str, state: AdapterState) -> None:
        """See the protocol. Takes as long as vLLM needs to load it.

        Raises:
            InvalidRequest: if vLLM can't serve it.
            EngineDied: if vLLM's process has ended.
        """
        with self._loading:
            with self._lock:
                if adapter_id in self._adapters:
                    return
            loaded = self._load(adapter_id, state)
            with self._lock:
                self._adapters[adapter_id] = loaded

    def _load(self, adapter_id: str, state: AdapterState) -> LoadedAdapter:
        adapters.check(state, self._model, self._config.max_lora_rank)
        number = next(self._numbers)
        if not adapters.is_finite(state):
            return LoadedAdapter(number, None)  # its numbers could reach other rows of a batch
        directory = self._files.write(number, state, self._model, self._config.path)
        request = self._api.LoRARequest(f"{number}", number, str(directory))
        try:
            self._wait_for(self._unless_dead(self._vllm.llm.add_lora(request)))
        except (EngineDied, self._api.EngineDeadError) as error:
            raise EngineDied(DIED) from error
        except Exception as error:
            self._files.remove(number)
            raise InvalidRequest(f"adapter: vllm refuses {adapter_id!r}: {words_of(error)}") from error
        return LoadedAdapter(number, request)

    def remove_adapter(self, adapter_id: str) -> None:
        with self._lock:
            adapter = self._adapters.pop(adapter_id, None)
            if adapter is None:
                return
            adapter.is_removed = True
            unused = adapter.users == 0
        if unused:
            self._unload(adapter)

    def generate(self, request: GenerateRequest) -> Future[SampleResponse]:
        future: Future[SampleResponse] = Future()
        future.set_running_or_notify_cancel()  # from here on only the engine ends it
        try:
            with self._lock:
                if self._is_closed:
                    raise ServerFault("the sampling engine has been closed")
                task = self._accept(request, future)
                if task.adapter is not None:
                    task.adapter.users += 1
                self._events.call_soon_threadsafe(self._loop.submit, task)
        except (InvalidRequest, NotFound, ServerFault) as error:
            future.set_exception(error)
        return future

    def _accept(self, request: GenerateRequest, future: Future[SampleResponse]) -> Task:
        adapter = None if request.adapter_id is None else self._adapters.get(request.adapter_id)
        if request.adapter_id is not None and adapter is None:
            raise NotFound(f"adapter_id: {request.adapter_id!r} is not resident in the sampler")
        has_tokenizer = self._tokenizer is not None
        return make_task(request, future, adapter, self._model, has_tokenizer, self._vllm.scores_tokens)

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id and not self._is_closed:
                self._events.call_soon_threadsafe(self._loop.cancel, request_id)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._wait_for(self._loop.close())
        self._wait_for(launch.stop(self._vllm.llm))
        self._stop()

    def _stop(self) -> None:
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()
        self._files.remove_all()

    def _done(self, task: Task) -> None:
        """A task has ended, on the engine's thread."""
        adapter = task.adapter
        if adapter is None:
            return
        with self._lock:
            adapter.users -= 1
            unused = adapter.is_removed and adapter.users == 0
        if unused:
            self._unload(adapter)

    def _unload(self, adapter: LoadedAdapter) -> None:
        if adapter.request is not None and not self._is_closed:
            asyncio.run_coroutine_threadsafe(self._remove_from_vllm(adapter), self._events)

    async def _remove_from_vllm(self, adapter: LoadedAdapter) -> None:
        with contextlib.suppress(Exception):  # it has gone with vLLM's process
            await self._unless_dead(self._vllm.llm.remove_lora(adapter.number))
        self._files.remove(adapter.number)

    async def _unless_dead(self, call: Coroutine[Any, Any, R]) -> R:
        """A call to vLLM's process, which vLLM itself never ends when that has died.

        Raises:
            EngineDied: if it has.
        """
        work = asyncio.ensure_future(call)
        while not (await asyncio.wait({work}, timeout=_LOOK_SECONDS))[0]:
            if self._vllm.llm.errored:
                work.cancel()
                raise EngineDied(DIED)
        return work.result()

    def _wait_for(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self._events).result()
