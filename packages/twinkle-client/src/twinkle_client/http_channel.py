"""The channel over HTTP: a thread with an event loop sends requests, retries those that may be retried, and polls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import httpx

from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.protocol.endpoints import JSON, OPERATION, PREFIX, PROTOBUF, Endpoint
from twinkle.protocol.errors import ConnectionFailed, RequestFailed, TwinkleError, from_status
from twinkle.protocol.operations import MAX_OPERATIONS, Posted, Reply
from twinkle.verbs.forks import reset_when_forked
from twinkle.verbs.proxies import through
from twinkle_client.http_clients import HttpClients
from twinkle_client.settings import Settings

log = logging.getLogger("twinkle_client")

# A request is retried for so long while the server can't be reached or is overloaded.
RETRY_SECONDS = 300.0
# Before the server has been reached at all: the address is more likely wrong than the server down.
UNREACHED_RETRY_SECONDS = 10.0
# When the program ends: a server that is gone must not keep it from ending.
EXIT_RETRY_SECONDS = 30.0
# Exponential backoff between tries.
FIRST_DELAY_SECONDS = 0.25
MAX_DELAY_SECONDS = 10.0

# Compressing smaller bodies takes longer than sending them.
COMPRESS_FROM_BYTES = 16_384

# How long a pass is held: long against the time between two calls of a loop, short against a training step.
LINGER_SECONDS = 0.002
# A larger body gains nothing from sharing a request, and is better sent while the next one is being made.
MAX_HELD_BYTES = 131_072


@dataclass(frozen=True, eq=False)
class Item:
    posted: Posted
    future: Future[Any]


@dataclass(eq=False)
class _Waiting:
    items: list[Item] = field(default_factory=list[Item])
    size: int = 0
    timer: asyncio.TimerHandle | None = None


class Outbox:
    """Holds passes for a moment, so that a training step's pass and its optimizer step go in one request: by run, in
    the order in which they were added. Single-threaded: called on one event loop.
    """

    def __init__(self, send: Callable[[list[Item]], None]) -> None:
        """
        Args:
            send: starts to send items in one request.
        """
        self._send = send
        self._waiting: dict[str, _Waiting] = {}

    def add(self, run_id: str, item: Item, ends_step: bool) -> None:
        """Send the item together with those of its run that are held, at once or in a moment.

        Args:
            ends_step: it is not held, and neither are those before it.
        """
        waiting = self._waiting.setdefault(run_id, _Waiting())
        waiting.items.append(item)
        waiting.size += len(item.posted.body)
        if ends_step or waiting.size >= MAX_HELD_BYTES or len(waiting.items) >= MAX_OPERATIONS:
            self._flush(run_id)
        elif waiting.timer is None:
            waiting.timer = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._flush, run_id)

    def take_all(self) -> list[Item]:
        """The items that are held, which are then not sent."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        for of_run in waiting:
            if of_run.timer is not None:
                of_run.timer.cancel()
        return [item for of_run in waiting for item in of_run.items]

    def _flush(self, run_id: str) -> None:
        waiting = self._waiting.pop(run_id)
        if waiting.timer is not None:
            waiting.timer.cancel()
        self._send(waiting.items)


class HttpChannel:
    """A `Channel` to a server. Operations carry ids (`seq_id` and the like), so a retry is idempotent."""

    def __init__(self, settings: Settings, retry_seconds: float = RETRY_SECONDS) -> None:
        self._settings = settings
        self._retry_seconds = retry_seconds
        self._reached = False
        self._closed = False
        self._parents: list[object] = []
        self._begin()
        reset_when_forked(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._clients: HttpClients | None = None
        # Both are used on the loop alone.
        self._outbox = Outbox(self._send_together)
        self._sending: set[asyncio.Task[None]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _channel_to, (self._settings, self._retry_seconds)

    def after_fork(self) -> None:
        """Start over with a thread and connections of this process."""
        # Kept alive: collecting them would close the parent's connections.
        self._parents.append((self._loop, self._clients, self._sending, self._outbox))
        self._begin()

    def hurry(self) -> None:
        """Retry for at most `EXIT_RETRY_SECONDS` from now on."""
        self._retry_seconds = min(self._retry_seconds, EXIT_RETRY_SECONDS)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def prepare(self, base_model: str | None) -> None:
        """Nothing to do: the server holds its model."""

    def submit(self, request: m.Operation) -> Future[m.Result]:
        loop = self._running_loop()
        # Encoded on the caller's thread: a request that can't be encoded is the caller's error, and nothing is sent.
        posted = Posted(OPERATION[type(request)], codec.encode(request))
        if isinstance(request, m.ForwardBackwardRequest | m.OptimStepRequest):
            item, is_step = Item(posted, Future()), isinstance(request, m.OptimStepRequest)
            loop.call_soon_threadsafe(self._outbox.add, request.model_id, item, is_step)
            return item.future
        work = self._sample(posted) if isinstance(request, m.SampleRequest) else self._operate(posted)
        return asyncio.run_coroutine_threadsafe(work, loop)

    def ask(self, query: m.Query[m.ReplyT]) -> Future[m.ReplyT]:
        loop = self._running_loop()  # first: it raises if the channel is closed
        return asyncio.run_coroutine_threadsafe(self._query(query), loop)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            loop, thread, clients = self._loop, self._thread, self._clients
            self._loop = self._thread = self._clients = None
        if loop is None or thread is None or clients is None:
            return
        # A server that is gone can't be told which samples were cancelled.
        with contextlib.suppress(concurrent.futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(self._cancel_all_and_close(clients), loop).result(5.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5.0)
        if not thread.is_alive():
            loop.close()

    # ------------------------------------------------------------ the thread

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise TwinkleError("this ServiceClient is closed; make a new one")
            if self._loop is None:
                self._clients = HttpClients(self._settings)  # first: it raises if the proxy is wrong
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=loop.run_forever, name="twinkle-client", daemon=True)
                self._thread.start()
                self._loop = loop
            return self._loop

    async def _cancel_all_and_close(self, clients: HttpClients) -> None:
        for item in self._outbox.take_all():
            item.future.cancel()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await clients.aclose()

    # ------------------------------------------------------------ operations

    async def _operate(self, posted: Posted) -> m.Result:
        """Post, then poll until there is a result."""
        promise = await self._post(posted)
        return await self._poll(posted.endpoint, promise.request_id)

    async def _sample(self, posted: Posted) -> m.Result:
        """Post alone, so that no sample waits for another; the result is in the reply, or is polled for."""
        try:
            [reply] = await self._post_together([posted])
            return await self._result(posted, reply)
        except asyncio.CancelledError:
            if self._clients is not None:
                # The reply would have named the request's id; sent again, it is a duplicate, whose id is known at once.
                promise = await self._post(posted)
                await self._query(m.CancelFutureRequest(request_id=promise.request_id))
            raise

    async def _post(self, posted: Posted) -> m.Promise:
        content_type = PROTOBUF if posted.endpoint.body == "protobuf" else JSON
        response = await self._send("POST", posted.endpoint.path, *_compressed(posted.body, content_type))
        return codec.decode_json(m.Promise, response.content)

    async def _poll(self, endpoint: Endpoint, request_id: str) -> m.Result:
        body = codec.encode_json(m.RetrieveFutureRequest(request_id=request_id))
        headers = {"Content-Type": JSON, "Accept": f"{PROTOBUF}, {JSON}"}
        while True:
            response = await self._send("POST", "/retrieve_future", body, headers)
            if response.status_code != 408:
                return _decode_result(endpoint, _content_type(response), response.content, request_id)
            pending = codec.decode_json(m.TryAgain, response.content)
            log.info("%s: not done yet: %s", endpoint.path, pending.queue_state_reason or "it is under way")

    # ------------------------------------------------------------ operations that go together

    def _send_together(self, items: list[Item]) -> None:
        task = asyncio.create_task(self._operate_together(items))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _operate_together(self, items: list[Item]) -> None:
        """Post several operations; results that are not in the reply are polled for."""
        try:
            replies = await self._post_together([item.posted for item in items])
        except asyncio.CancelledError:
            for item in items:
                item.future.cancel()
            return
        except Exception as error:
            for item in items:
                item.future.set_exception(error)
            return
        await asyncio.gather(*(self._settle(item, reply) for item, reply in zip(items, replies, strict=True)))

    async def _post_together(self, posted: list[Posted]) -> list[Reply]:
        body = operations.encode_request(posted)
        response = await self._send("POST", operations.PATH, *_compressed(body, PROTOBUF))
        return operations.decode_reply(response.content)

    async def _settle(self, item: Item, reply: Reply) -> None:
        try:
            result = await self._result(item.posted, reply)
        except asyncio.CancelledError:
            item.future.cancel()
        except Exception as error:
            item.future.set_exception(error)
        else:
            item.future.set_result(result)

    async def _result(self, posted: Posted, reply: Reply) -> m.Result:
        if reply.status == 408:
            return await self._poll(posted.endpoint, reply.request_id)
        if reply.status in (429, 503):  # transient: on its own path the request is retried until it passes
            return await self._operate(posted)
        if reply.status >= 400:
            raise from_status(reply.status, _message(reply.status, reply.body), None)
        return _decode_result(posted.endpoint, reply.content_type, reply.body, reply.request_id)

    async def _query(self, query: m.Query[m.ReplyT]) -> m.ReplyT:
        path, body, params = _encode_query(query)
        headers = {"Content-Type": JSON}
        if (key := getattr(query, "idempotency_key", None)) is not None:
            headers["X-Idempotency-Key"] = key
        response = await self._send(query.method, path, body, headers, params)
        return codec.decode_json(query.reply_type(), response.content)

    # ------------------------------------------------------------ one request, retried

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        params: dict[str, Any] | None = None,
    ) -> httpx.Response:
        """Retry until there is a final reply. (That to a poll may be 408: no result yet.)

        Raises:
            TwinkleError: what the server said, or that it could not be reached.
        """
        assert self._clients is not None, "the loop only runs with a client"
        url = _url(self._settings.base_url, path)
        begun = time.monotonic()
        delay = FIRST_DELAY_SECONDS
        while True:
            try:
                response = await self._clients.request(
                    method, url, content=body, headers=headers, params=params
                )
            except httpx.TransportError as failure:
                error, wanted = self._unreachable(failure), delay
            else:
                error = _error_of(response)
                wanted = getattr(error, "retry_after", delay)
                if _is_from_a_server(response):
                    self._reached = True
                else:
                    error = self._not_twinkle(response)
                if error is None:
                    return response
                if not _may_retry(response):
                    raise error
            if time.monotonic() + wanted > begun + self._retry_limit():
                raise error
            log.info("%s %s: %s; trying again in %.1f s", method, path, error, wanted)
            await asyncio.sleep(wanted)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    def _retry_limit(self) -> float:
        """In seconds. It changes while a request is retried: the program may end."""
        return self._retry_seconds if self._reached else min(UNREACHED_RETRY_SECONDS, self._retry_seconds)

    def _not_twinkle(self, response: httpx.Response) -> TwinkleError:
        """The error for a reply that no Twinkle server sent."""
        url = self._settings.base_url
        start = " ".join(response.text[:200].split())
        return ConnectionFailed(
            f"what answers at {url}{through(url)} is no Twinkle server, or something in front of one: HTTP "
            f"{response.status_code}, {start!r}; is base_url (or TWINKLE_BASE_URL) right, and the server running?"
        )

    def _unreachable(self, failure: httpx.TransportError) -> TwinkleError:
        hint = ""
        if self._settings.base_url.startswith("https://") and "SSL" in str(failure):
            hint = " A server without certificates is reached by http://."
        return ConnectionFailed(
            f"the server at {self._settings.base_url} can't be reached{through(self._settings.base_url)} "
            f"({str(failure) or type(failure).__name__}); is it running, and is base_url (or "
            f"TWINKLE_BASE_URL) right?{hint}"
        )


@lru_cache(maxsize=64)
def _url(base_url: str, path: str) -> httpx.URL:
    """Whole, and kept: httpx takes a tenth of a request's time to put a path behind its base."""
    return httpx.URL(base_url.rstrip("/") + PREFIX + path)


_channels: weakref.WeakValueDictionary[Settings, HttpChannel] = weakref.WeakValueDictionary()


def _channel_to(settings: Settings, retry_seconds: float) -> HttpChannel:
    """The channel for unpickled clients: those of one server share it."""
    channel = _channels.get(settings)
    if channel is None or channel.is_closed:
        channel = _channels[settings] = HttpChannel(settings, retry_seconds)
    return channel


def _is_from_a_server(response: httpx.Response) -> bool:
    """Whether a Twinkle server sent this, and no proxy or other server: a success has one of its content types, and an
    error its form.
    """
    if response.status_code < 300 or response.status_code == 408:
        return _content_type(response).startswith((JSON, PROTOBUF))
    return _error_body(response.content) is not None


def _compressed(body: bytes, content_type: str) -> tuple[bytes, dict[str, str]]:
    headers = {"Content-Type": content_type}
    if len(body) >= COMPRESS_FROM_BYTES:
        return codec.compress(body), {**headers, "Content-Encoding": "zstd"}
    return body, headers


def _encode_query(query: m.Query[Any]) -> tuple[str, bytes | None, dict[str, Any] | None]:
    """Path, JSON body and query string of a query."""
    # A PUT may set a field to null.
    fields = query.model_dump(mode="json", exclude_none=query.method != "PUT", exclude={"idempotency_key"})
    in_path = {name for name in fields if f"{{{name}}}" in query.path}
    path = query.path.format(**{name: fields[name] for name in in_path})
    if query.method in ("POST", "PUT"):
        return path, json.dumps(fields).encode(), None
    return path, None, {name: value for name, value in fields.items() if name not in in_path} or None


def _decode_result(endpoint: Endpoint, content_type: str, body: bytes, request_id: str) -> m.Result:
    """
    Raises:
        RequestFailed: if the operation has failed.
    """
    is_failure = content_type.startswith(JSON) and _error_body(body) is not None
    kind = m.Failure if is_failure else endpoint.result
    result = codec.decode_result(Encoded(kind.__name__, body))
    if isinstance(result, m.Failure):
        raise RequestFailed(result.error, result.category, request_id)
    return result


def _content_type(response: httpx.Response) -> str:
    return response.headers.get("content-type", "")


def _may_retry(response: httpx.Response) -> bool:
    """Whether the failure is transient: a limit, a service that is not available, a body that came too slowly, or a 5xx
    that the service didn't write itself, since its process is gone.
    """
    return response.status_code in (408, 429, 503) or (
        response.status_code >= 500 and _error_body(response.content) is None
    )


def _error_body(body: bytes) -> str | None:
    """The sentence of an error in the service's form; None for anything else."""
    try:
        values = json.loads(body)
    except ValueError:
        return None
    if not isinstance(values, dict) or "error" not in values:
        return None
    return str(cast(dict[str, object], values)["error"])


def _message(status: int, body: bytes) -> str:
    return _error_body(body) or body[:500].decode(errors="replace") or f"HTTP {status}"


def _error_of(response: httpx.Response) -> TwinkleError | None:
    """The error that a reply stands for; None if it is none."""
    is_pending = response.status_code == 408 and _error_body(response.content) is None
    if response.status_code < 400 or is_pending:
        return None
    retry_after = response.headers.get("retry-after", "")
    seconds = float(retry_after) if retry_after.replace(".", "", 1).isdigit() else None
    return from_status(response.status_code, _message(response.status_code, response.content), seconds)
