"""The service of a server with several engines: passes each request to the engine that it belongs to.

A run or a sampling session is on one engine, which the store knows; a request's id names the engine that accepted it.
What belongs to none, lists say, is answered by the first engine that works: they share store and files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.errors import TwinkleError, Unavailable
from twinkle.server.gateway.port import ServicePort
from twinkle.server.scheduling.futures import Fetched
from twinkle.server.scheduling.records import ENGINE_MARK
from twinkle.server.serve.fleet_view import FleetView
from twinkle.server.service.metrics import merged
from twinkle.server.store.database import Database
from twinkle.server.store.tables import Engine
from twinkle.server.tokens import TOKENIZER, Download

Connect: TypeAlias = Callable[[str], ServicePort]
"""The service of an engine, by its name."""

# Queries about one checkpoint, answered where its run is: that engine knows what is being written.
_OF_CHECKPOINT = (
    m.DeleteCheckpoint,
    m.PublishCheckpoint,
    m.UnpublishCheckpoint,
    m.SetCheckpointTtl,
    m.GetCheckpointUrls,
    m.GetCheckpointArchive,
)


class Router:
    """A `ServicePort` in front of others."""

    def __init__(self, view: FleetView, database: Database, connect: Connect) -> None:
        self._view = view
        self._database = database
        self._connect = connect
        self._known: dict[str, ServicePort] = {}

    async def _engine(self, name: str) -> ServicePort:
        """
        Raises:
            Unavailable: if that engine doesn't work now.
        """
        row = (await self._view.engines()).get(name)
        if row is None or row.state not in ("running", "draining"):
            raise Unavailable(_why_not(row), 5.0)
        if name not in self._known:
            self._known[name] = self._connect(name)
        return self._known[name]

    async def ready(self) -> None:
        """Raises `Unavailable` if a model has no engine that is ready."""
        rows = (await self._view.engines()).values()
        wanted = {row.base_model for row in rows if row.wanted == "run" and row.moved_to is None}
        for model in sorted(wanted) or [None]:
            working = [row.name for row in rows if row.base_model == model and row.state == "running"]
            await self._any_ready(model, working)

    async def _any_ready(self, model: str | None, engines: Sequence[str]) -> None:
        failure = Unavailable(f"{model or 'a model'} is not ready yet", 2.0)
        for name in engines:
            try:
                return await (await self._engine(name)).ready()
            except Unavailable as error:
                failure = error
        raise failure

    async def metrics(self) -> str:
        """Of all engines that work; each has its name as a label."""
        names = [
            row.name for row in (await self._view.engines()).values() if row.state in ("running", "draining")
        ]

        async def of(name: str) -> str:
            try:
                return await (await self._engine(name)).metrics()
            except Unavailable:  # it has just ended, say; the others' are there
                return ""

        return merged(dict(zip(names, await asyncio.gather(*map(of, names)), strict=True)))

    # ------------------------------------------------------------ operations

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise:
        engine = await self._engine(await self._engine_of_operation(tenant, request))
        return await engine.submit(tenant, request, body, digest)

    async def _engine_of_operation(self, tenant: str, request: m.Operation) -> str:
        view = self._view
        match request:
            case m.CreateModelRequest():
                return await self._place_run(request.session_id, request.model_seq_id, request.base_model)
            case m.LoadWeightsRequest(model_id=None, session_id=str(session), model_seq_id=int(number)):
                model, beside = await self._model_of(tenant, request.path)
                if model is None:  # it says what is wrong with the path
                    return beside or await view.front()
                return await self._place_run(session, number, model)
            case m.SampleRequest():
                return await self._placed(request.sampling_session_id)
            case m.SaveWeightsForSamplerRequest(path=None, sampling_session_seq_id=int(number)):
                return await self._place_beside_run(request.model_id, number)
            case m.CreateCustomLossRequest():
                return await view.front()
            case _:
                return await self._placed(request.model_id or "")

    async def _place_run(self, session_id: str, number: int, model: str) -> str:
        return await self._view.place(f"{session_id}:train:{number}", session_id, model)

    async def _place_beside_run(self, run_id: str, number: int) -> str:
        """Ephemeral weights are sampled where their run is: elsewhere they can only be read once they are written."""
        engine = await self._view.placement(run_id)
        if engine is None:
            return await self._view.front()  # it says that there is no such run
        session_id = run_id.partition(":")[0]
        return await self._view.put(f"{session_id}:sample:{number}", session_id, engine)

    async def _placed(self, placed_id: str) -> str:
        """The engine that something is on; the first one says that there is no such thing."""
        return await self._view.placement(placed_id) or await self._view.front()

    async def _model_of(self, tenant: str, path: str) -> tuple[str | None, str | None]:
        """The base model of a checkpoint, and the engine that its run is on, as far as they are known."""
        uri = uris.parse(path)
        beside = await self._view.placement(uri.run_id) if uri.run_id else None
        model = await asyncio.to_thread(self._database.base_model_of, uri, tenant)
        if model is None and beside is not None:  # it is being written
            model = (await self._view.engines())[beside].base_model
        return model, beside

    async def fetch(
        self, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None = None
    ) -> list[Fetched]:
        by_engine: dict[str, list[str]] = {}
        for request_id in request_ids:
            by_engine.setdefault(await self._engine_of_request(request_id), []).append(request_id)
        replies = await asyncio.gather(
            *(self._fetch(each, tenant, ids, timeout, most_bytes) for each, ids in by_engine.items())
        )
        found = {
            request_id: reply
            for ids, fetched in zip(by_engine.values(), replies, strict=True)
            for request_id, reply in zip(ids, fetched, strict=True)
        }
        return [found[request_id] for request_id in request_ids]

    async def _fetch(
        self, engine: str, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None
    ) -> list[Fetched]:
        return await (await self._engine(engine)).fetch(tenant, request_ids, timeout, most_bytes)

    async def _engine_of_request(self, request_id: str) -> str:
        name = request_id.partition(ENGINE_MARK)[2]
        if name in await self._view.engines():
            return await self._view.now_at(name)
        return await self._view.front()

    # ------------------------------------------------------------ queries

    async def ask(self, tenant: str, query: m.Query[m.ReplyT]) -> m.ReplyT:
        if isinstance(query, m.GetServerCapabilities):
            return cast(m.ReplyT, await self._capabilities(tenant))
        if isinstance(query, m.SessionHeartbeatRequest | m.FinishSessionRequest):
            return cast(m.ReplyT, await self._ask_all(tenant, query.session_id, query))
        front = await self._engine_of_query(tenant, query)
        if isinstance(query, m.GetUsage):  # each engine writes down what it has counted before it answers
            others = [name for name in await self._working() if name != front]
            await asyncio.gather(*(self._ask(each, tenant, query) for each in others), return_exceptions=True)
        return cast(m.ReplyT, await self._ask(front, tenant, query))

    async def _working(self) -> list[str]:
        return [name for name, row in (await self._view.engines()).items() if row.state == "running"]

    async def _ask(self, engine: str, tenant: str, query: m.Query[m.ReplyT]) -> m.ReplyT:
        return await (await self._engine(engine)).ask(tenant, query)

    async def _engine_of_query(self, tenant: str, query: m.Query[Any]) -> str:
        match query:
            case m.GetInfoRequest():
                return await self._placed(query.model_id)
            case m.GetTokenizerUrls():
                return await self._view.any_with(query.base_model)
            case m.CreateSamplingSessionRequest():
                return await self._place_sampler(tenant, query)
            case m.JoinSamplingSessionRequest():
                return await self._placed(query.sampling_session_id)
            case m.RetrieveFuturesRequest():
                return await self._placed(query.target.sampling_session_id)
            case m.CancelFutureRequest():
                return await self._engine_of_request(query.request_id)
            case _ if isinstance(query, _OF_CHECKPOINT):
                return await self._placed(query.run_id)
            case _:
                return await self._view.front()

    async def _place_sampler(self, tenant: str, query: m.CreateSamplingSessionRequest) -> str:
        """Beside the run whose weights they are, where those are at hand."""
        model, beside = query.base_model, None
        if query.model_path is not None:
            found, beside = await self._model_of(tenant, query.model_path)
            model = found or model
        if model is None:  # it says what is missing, or not there
            return await self._view.front()
        sampler_id = f"{query.session_id}:sample:{query.sampling_session_seq_id}"
        return await self._view.place(sampler_id, query.session_id, model, beside)

    async def _ask_all(self, tenant: str, session_id: str, query: m.Query[m.ReplyT]) -> m.ReplyT:
        """Ask each engine that has anything of a session, and the first, which knows of all sessions.

        An engine that doesn't answer hears of it again if it matters: heartbeats come every few seconds, and a
        session whose end it missed is found idle.
        """
        front = await self._view.front()
        engines = await self._view.of_session(session_id) - {front}
        asked = (self._ask(engine, tenant, query) for engine in (front, *engines))
        reply, *others = await asyncio.gather(*asked, return_exceptions=True)
        for failure in (reply, *(each for each in others if not isinstance(each, TwinkleError))):
            if isinstance(failure, BaseException):
                raise failure
        return cast(m.ReplyT, reply)

    async def _capabilities(self, tenant: str) -> m.ServerCapabilities:
        engines = [await self._view.any_with(model) for model in await self._view.models()]
        query = m.GetServerCapabilities()
        replies = await asyncio.gather(*(self._ask(each, tenant, query) for each in engines))
        if not replies:
            raise Unavailable("no engine of this server is ready", 2.0)
        models = [model for reply in replies for model in reply.supported_models]
        return replies[0].model_copy(update={"supported_models": models})

    # ------------------------------------------------------------ downloads

    async def download_sizes(self, download: Download) -> dict[str, int]:
        return await (await self._source(download)).download_sizes(download)

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes:
        return await (await self._source(download)).download_part(download, name, offset, size)

    async def _source(self, download: Download) -> ServicePort:
        if download.place == TOKENIZER:
            return await self._engine(await self._view.any_with(download.stamp))
        run_id = uris.parse(download.place).run_id
        return await self._engine(await self._placed(run_id or ""))


def _why_not(row: Engine | None) -> str:
    if row is None:
        return "the engine that this was on is not known any more"
    if row.state == "stopped" and row.wanted != "run":
        return (
            f"{row.base_model} is not served just now: its engine was stopped by the operator, and what was on it goes "
            "on when the model is added again"
        )
    return f"the engine of {row.base_model} that this is on is being started or moved; try again"
