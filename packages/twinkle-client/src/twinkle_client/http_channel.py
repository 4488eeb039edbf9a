"""The channel over HTTP: one thread with an event loop sends requests, retries what may be retried, and long-polls."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import httpx

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, OPERATION, PREFIX, PROTOBUF, QUERY, Endpoint, QueryEndpoint
from twinkle.protocol.errors import ConnectionFailed, RequestFailed, TwinkleError, from_status
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle_client._version import __version__
from twinkle_client.settings import Settings

log = logging.getLogger("twinkle_client")

R = TypeVar("R")

# How long a request is tried again while the server can't be reached or says that it is overloaded.
PATIENCE_SECONDS = 300.0
# ... and before it has been reached at all, when the address is more likely wrong than the server down.
FIRST_PATIENCE_SECONDS = 10.0
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 10.0

# The server ends a long poll after 25 s; bodies may be large.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)

# Bodies smaller than this are not worth compressing.
COMPRESS_FROM_BYTES = 16_384


class HttpChannel:
    """A `Channel` to a server. Every operation carries ids of its own, so that sending it twice does it once."""

    def __init__(self, settings: Settings, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._settings = settings
        self._patience_seconds = patience_seconds
        self._reached = False
        self._closed = False
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx.AsyncClient | None = None

    def prepare(self, base_model: str | None) -> None:
        """Nothing to do: the server holds its model."""

    def submit(self, request: m.Operation) -> Future[m.Result]:
        # Encoded here, so that what can't be encoded is the caller's error, and nothing counts as sent.
        return self._start(self._operate(request, *_encode(request)))

    def ask(self, query: m.Query) -> Future[m.Reply]:
        return self._start(self._query(query))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            loop, thread, client = self._loop, self._thread, self._client
            self._loop = self._thread = self._client = None
        if loop is None or thread is None or client is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all_and_close(client), loop).result(5.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5.0)
        if not thread.is_alive():
            loop.close()

    # ------------------------------------------------------------ the thread

    def _start(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        with self._lock:
            if self._closed:
                work.close()
                raise TwinkleError("this ServiceClient is closed; make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="twinkle-client", daemon=True
                )
                self._thread.start()
                self._client = _http_client(self._settings)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    # ------------------------------------------------------------ operations

    async def _operate(self, request: m.Operation, body: bytes, headers: dict[str, str]) -> m.Result:
        """Post, then poll until there is a result."""
        endpoint = OPERATION[type(request)]
        response = await self._send("POST", endpoint.path, body, headers)
        promise = codec.decode_json(m.Promise, response.content)
        try:
            return await self._poll(endpoint, promise.request_id)
        except asyncio.CancelledError:
            if isinstance(request, m.SampleRequest) and self._client is not None:
                await self._query(m.CancelFutureRequest(request_id=promise.request_id))
            raise

    async def _poll(self, endpoint: Endpoint, request_id: str) -> m.Result:
        body = codec.encode_json(m.RetrieveFutureRequest(request_id=request_id))
        headers = {"Content-Type": JSON, "Accept": f"{PROTOBUF}, {JSON}"}
        while True:
            response = await self._send("POST", "/retrieve_future", body, headers)
            if response.status_code != 408:
                return _decode_result(endpoint, response, request_id)
            pending = codec.decode_json(m.Pending, response.content)
            log.info("%s: not done yet: %s", endpoint.path, pending.queue_state_reason or "it is under way")

    async def _query(self, query: m.Query) -> m.Reply:
        endpoint = QUERY[type(query)]
        path, body, params = _encode_query(endpoint, query)
        headers = {"Content-Type": JSON}
        if (key := getattr(query, "idempotency_key", None)) is not None:
            headers["X-Idempotency-Key"] = key
        response = await self._send(endpoint.method, path, body, headers, params)
        return cast(m.Reply, codec.decode_json(endpoint.reply, response.content))  # pyright: ignore

    # ------------------------------------------------------------ one request, retried

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        params: dict[str, Any] | None = None,
    ) -> httpx.Response:
        """Send until the server answers with something final (408 to a poll is final too: "ask again").

        Raises:
            TwinkleError: what the server said, or that it could not be reached.
        """
        assert self._client is not None, "the loop only runs with a client"
        patience = (
            self._patience_seconds if self._reached else min(FIRST_PATIENCE_SECONDS, self._patience_seconds)
        )
        give_up = time.monotonic() + patience
        delay = FIRST_DELAY_SECONDS
        while True:
            try:
                response = await self._client.request(
                    method, PREFIX + path, content=body, headers=headers, params=params
                )
            except httpx.TransportError as failure:
                error, wanted = self._unreachable(failure), delay
            else:
                self._reached = True
                error = _error_of(response)
                if error is None:
                    return response
                if not _may_retry(response):
                    raise error
                wanted = getattr(error, "retry_after", delay)
            if time.monotonic() + wanted > give_up:
                raise error
            log.info("%s %s: %s; trying again in %.1f s", method, path, error, wanted)
            await asyncio.sleep(wanted)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)

    def _unreachable(self, failure: httpx.TransportError) -> TwinkleError:
        hint = ""
        if self._settings.base_url.startswith("https://") and "SSL" in str(failure):
            hint = " A server without certificates is reached by http://."
        return ConnectionFailed(
            f"the server at {self._settings.base_url} can't be reached ({failure or type(failure).__name__}); is it "
            f"running, and is base_url (or TWINKLE_BASE_URL) right?{hint}"
        )


async def _cancel_all_and_close(client: httpx.AsyncClient) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()


def _http_client(settings: Settings) -> httpx.AsyncClient:
    headers = {"User-Agent": f"twinkle-client/{__version__}"}
    if settings.api_key:
        headers["X-API-Key"] = settings.api_key
    # Each operation under way holds a connection for its long poll: no limit but what is under way.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=settings.base_url, headers=headers, timeout=TIMEOUT, limits=limits)


def _encode(request: m.Operation) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    if isinstance(request, m.ForwardBackwardRequest):
        body, headers = codec.encode_forward_backward(request), {"Content-Type": PROTOBUF}
    else:
        body, headers = codec.encode_json(request), {"Content-Type": JSON}
    if len(body) >= COMPRESS_FROM_BYTES:
        return codec.compress(body), {**headers, "Content-Encoding": "zstd"}
    return body, headers


def _encode_query(endpoint: QueryEndpoint, query: m.Query) -> tuple[str, bytes | None, dict[str, Any] | None]:
    """Path, JSON body and query string of a query."""
    # What a PUT sets may be set to nothing.
    fields = query.model_dump(mode="json", exclude_none=endpoint.method != "PUT", exclude={"idempotency_key"})
    in_path = {name for name in fields if f"{{{name}}}" in endpoint.path}
    path = endpoint.path.format(**{name: fields[name] for name in in_path})
    if endpoint.method in ("POST", "PUT"):
        return path, json.dumps(fields).encode(), None
    return path, None, {name: value for name, value in fields.items() if name not in in_path} or None


def _decode_result(endpoint: Endpoint, response: httpx.Response, request_id: str) -> m.Result:
    if endpoint.result is ForwardBackwardOutput and _is_protobuf(response):
        return codec.decode_forward_backward_output(response.content)
    if endpoint.result is SampleResponse and _is_protobuf(response):
        return codec.decode_sample(response.content)
    values = response.json()
    if "error" in values:
        failure = m.Failure.model_validate(values)
        raise RequestFailed(failure.error, failure.category, request_id)
    return cast(m.Result, codec.decode_json(endpoint.result, response.content))  # pyright: ignore


def _is_protobuf(response: httpx.Response) -> bool:
    return response.headers.get("content-type", "").startswith(PROTOBUF)


def _may_retry(response: httpx.Response) -> bool:
    """Limits pass; so do 5xx that don't come from the service itself but from a process of it that is gone."""
    return response.status_code == 429 or (response.status_code >= 500 and _error_body(response) is None)


def _error_body(response: httpx.Response) -> str | None:
    """The service's own sentence, if this is an error in its form."""
    try:
        values = response.json()
    except ValueError:
        return None
    if not isinstance(values, dict) or "error" not in values:
        return None
    return str(cast(dict[str, object], values)["error"])


def _error_of(response: httpx.Response) -> TwinkleError | None:
    """The error that the server answered with, if it is one."""
    if response.status_code < 400 or response.status_code == 408:
        return None
    message = _error_body(response) or response.text[:500] or f"HTTP {response.status_code}"
    retry_after = response.headers.get("retry-after", "")
    seconds = float(retry_after) if retry_after.replace(".", "", 1).isdigit() else None
    return from_status(response.status_code, message, seconds)
