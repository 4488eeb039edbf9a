"""Local mode: the same verbs in this process. No Ray, no HTTP, no server to start.

from twinkle import ServiceClient
training_client = ServiceClient().create_lora_training_client(base_model="Qwen/Qwen3.5-4B", rank=16)
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, RequestFailed, TwinkleError
from twinkle.protocol.results import with_plain_rows
from twinkle.protocol.types import SampleResponse
from twinkle.server.app import build_service
from twinkle.server.config import LimitsSection, ModelSection, ServerConfig, load_config
from twinkle.server.engine.worker import WorkerPort, build_worker
from twinkle.server.plan import Plan, make_plan
from twinkle.server.sampler_plan import NO_ENGINE
from twinkle.server.service.service import Service
from twinkle.verbs.forks import reset_when_forked
from twinkle.verbs.service import ServiceClientBase

R = TypeVar("R")

TENANT = "local"


class ServiceClient(ServiceClientBase):
    """The service in this process; the base model is loaded when it is first named."""

    def __init__(
        self,
        config: ServerConfig | str | os.PathLike[str] | None = None,
        user_metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: a server's configuration, or its file; if None, defaults and the base model that is first asked
                for. (`server` and `ray` don't matter here.)
        """
        loaded = config if config is None or isinstance(config, ServerConfig) else load_config(config)
        super().__init__(LocalChannel(loaded), user_metadata)
        _call_at_exit(weakref.WeakMethod(self._close_at_exit))


def _call_at_exit(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method, if its object is still there, when the program's main thread has ended.

    What `atexit` calls comes too late: no thread of a pool takes work any more then, and the service needs some to
    write what it still has to. So it is called before those end, by the hook by which they end, which has no official
    name.
    """

    def call() -> None:
        if (bound := method()) is not None:
            bound()

    register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
    register(call)


class LocalChannel:
    """A `Channel` to a service on a thread of this process."""

    def __init__(self, config: ServerConfig | None) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._service: Service | None = None
        self._is_forked = False
        reset_when_forked(self)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("clients of local mode can't be pickled: their model is in this process")

    def prepare(self, base_model: str | None) -> None:
        """Load the base model, once.

        Raises:
            InvalidRequest: if no model is named and none is loaded, or it would take several processes.
            NotFound: if the model can't be found.
        """
        self._refuse_if_forked()
        with self._lock:
            if self._service is not None:
                return
            config = self._config
            if config is None:
                if base_model is None:
                    raise InvalidRequest(
                        "base_model: missing; local mode loads the model that is first named"
                    )
                config = ServerConfig(model=ModelSection(model_id=base_model), limits=LimitsSection.none())
            elif base_model is not None and plain_name(base_model) != plain_name(config.model.model_id):
                raise InvalidRequest(
                    f"base_model: {base_model!r} is not the configured model, {config.model.model_id!r}"
                )
            if config.model.data_parallel_size == "auto":
                one_copy = config.model.model_copy(update={"data_parallel_size": 1})
                config = config.model_copy(update={"model": one_copy})
            engine = None if config.sampler.engine == NO_ENGINE else config.sampler.engine
            plan = make_plan(config)
            if plan.num_ranks > 1:
                raise InvalidRequest(
                    f"model: these settings make {plan.num_ranks} ranks, each a process of its own, and local mode is "
                    "one process; start a server (twinkle-server launch)"
                )
            worker = build_worker(plan.model, plan.backend, engine)
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="twinkle-local", daemon=True)
            self._thread.start()
            self._service = asyncio.run_coroutine_threadsafe(_start(plan, worker), self._loop).result()

    def hurry(self) -> None:
        """Nothing to do: there is no server that may be gone."""

    def after_fork(self) -> None:
        """The service's threads are the parent's; what is asked here is refused."""
        # Kept, since to collect it would touch what the parent uses.
        self._parents = self._loop, self._thread, self._service
        self._is_forked = self._loop is not None
        self._lock = threading.Lock()
        self._loop = self._thread = self._service = None

    def submit(self, request: m.Operation) -> Future[m.Result]:
        return self._run(self._operate(request))

    def ask(self, query: m.Query[m.ReplyT]) -> Future[m.ReplyT]:
        return self._run(self._opened().ask(TENANT, query))

    def close(self) -> None:
        with self._lock:
            loop, thread, service = self._loop, self._thread, self._service
            self._loop = self._thread = self._service = None
        if loop is None or thread is None or service is None:
            return
        asyncio.run_coroutine_threadsafe(service.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _operate(self, request: m.Operation) -> m.Result:
        service = self._opened()
        promise = await service.submit(TENANT, request, digest=b"")
        try:
            return await self._result(service, promise)
        except asyncio.CancelledError:
            await service.ask(TENANT, m.CancelFutureRequest(request_id=promise.request_id))
            raise

    @staticmethod
    async def _result(service: Service, promise: m.Promise) -> m.Result:
        while True:
            outcome = await service.retrieve(TENANT, promise.request_id, timeout=3600.0)
            if isinstance(outcome, m.Failure):
                raise RequestFailed(outcome.error, outcome.category, promise.request_id)
            if not isinstance(outcome, m.TryAgain):
                return with_plain_rows(outcome) if isinstance(outcome, SampleResponse) else outcome

    def _refuse_if_forked(self) -> None:
        if self._is_forked:
            raise TwinkleError(
                "this ServiceClient runs in the process that forked; local mode is one process: use it there, or start "
                "a server (twinkle-server launch) for several"
            )

    def _opened(self) -> Service:
        self._refuse_if_forked()
        if self._service is None:
            raise InvalidRequest(
                "no base model is loaded yet: create a training client or a sampling client first"
            )
        return self._service

    def _run(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        if self._loop is None:
            work.close()
            self._refuse_if_forked()
            raise TwinkleError("this ServiceClient is closed, or has loaded no model yet")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _start(plan: Plan, worker: WorkerPort) -> Service:
    service = build_service(plan.config, worker, plan.model.path)
    await service.start()
    return service
