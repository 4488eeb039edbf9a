"""The service of an engine in another process, over its deployment's handle."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from twinkle.protocol import messages as m
from twinkle.protocol.errors import TwinkleError, Unavailable
from twinkle.server.tokens import Download

if TYPE_CHECKING:
    from twinkle.server.scheduling.futures import Fetched

# A running engine says at once whether it is ready.
_READY_SECONDS = 2.0
# Nothing but a long poll takes an engine so long. Serve itself waits for an engine that is started again.
_ANSWER_SECONDS = 120.0


class HandleService:
    """A `ServicePort` over a deployment handle."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = cast(Any, engine)

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._call(self._engine.ready.remote())
        except TimeoutError as error:
            raise Unavailable("the engine doesn't answer", 2.0) from error

    async def metrics(self) -> str:
        return await self._call(self._engine.metrics.remote())

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise:
        return await self._call(self._engine.submit.remote(tenant, request, body, digest))

    async def fetch(
        self, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None = None
    ) -> list[Fetched]:
        return await self._wait(self._engine.fetch.remote(tenant, request_ids, timeout, most_bytes))

    async def ask(self, tenant: str, query: m.Query[m.ReplyT]) -> m.ReplyT:
        answer = self._engine.ask.remote(tenant, query)
        is_long = isinstance(query, m.RetrieveFuturesRequest)
        return await (self._wait(answer) if is_long else self._call(answer))

    async def download_sizes(self, download: Download) -> dict[str, int]:
        return await self._call(self._engine.download_sizes.remote(download))

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes:
        return await self._call(self._engine.download_part.remote(download, name, offset, size))

    async def _wait(self, response: Any) -> Any:
        """`_call` for long polls: if the client hangs up, cancels the call in the engine too, where it would count as
        waiting. By itself Serve doesn't stop a call whose caller was cancelled.
        """
        try:
            return await self._call(response)
        except asyncio.CancelledError:
            response.cancel()
            raise

    @staticmethod
    async def _call(response: Any) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                value = await response
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable(
                "the model's engine has ended, or doesn't answer, and is started again or moved: what it had accepted "
                "goes on; ask again",
                2.0,
            ) from error
        if isinstance(value, TwinkleError):
            raise value
        return value
