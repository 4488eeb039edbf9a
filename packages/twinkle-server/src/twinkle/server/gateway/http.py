"""HTTP shared by all routes: request bodies within limits of memory and time, and large replies."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, LimitReached, TooLarge
from twinkle.protocol.operations import Posted
from twinkle.server.config import LimitsSection
from twinkle.server.scheduling.threads import TenantThreads

T = TypeVar("T")

# The largest request without tokens or tensors. Parsed JSON can take twenty times as much memory.
MAX_PLAIN_BYTES = 2**20
# The most values in a JSON body's lists and objects, and the most objects, which take the most memory.
_MAX_PLAIN_VALUES = 2**16
_MAX_OBJECTS = 2**13
# A sample may also list tokens to score at each position of its prompt; each takes this many bytes of JSON.
_MAX_TARGETS = 2**20
_TOKEN_BYTES = 8

# Each part of this size, and the last one, must arrive within PART_SECONDS; the whole body within BODY_SECONDS.
PART_BYTES = 2**19
PART_SECONDS = 30.0
BODY_SECONDS = 900.0

# A tenant may hold this much even while the limit for all tenants together is reached.
SMALL_BYTES = 2**16
_ROOM_SECONDS = 2.0

# Larger bodies are decompressed and decoded in a thread, to keep the event loop free.
INLINE_BYTES = 2**16
_DECODING_THREADS = 2


class ByteBudget:
    """Bytes that tenants hold at once, each and all together. Single-threaded.

    While all together are at their limit, each tenant may still hold `SMALL_BYTES`: the large bodies of some must not
    keep out the small ones of others.
    """

    def __init__(self, name: str, per_tenant: int | None, in_all: int | None) -> None:
        """
        Args:
            name: the limit's name in the configuration; that of a single tenant ends in `_per_tenant`.
        """
        self._name = name
        self._per_tenant = per_tenant
        self._in_all = in_all
        self._tenants: dict[str, int] = {}
        self.held = 0
        """Total over all tenants."""

    @property
    def most(self) -> float:
        """The most that one share can hold."""
        return min(limit or math.inf for limit in (self._per_tenant, self._in_all))

    def check(self, tenant: str, amount: int) -> None:
        """
        Raises:
            LimitReached: if `amount` more bytes would exceed a limit.
        """
        own = self._tenants.get(tenant, 0)
        in_all = None if own + amount <= SMALL_BYTES else self._in_all
        for name, held, limit in (
            (f"{self._name}_per_tenant", own, self._per_tenant),
            (self._name, self.held, in_all),
        ):
            if limit is not None and held + amount > limit:
                raise LimitReached(
                    f"limits.{name}: {held} bytes are held and {amount} more sent, but {limit} is the most that this "
                    "server takes at once; send it again when others have been read",
                    _ROOM_SECONDS,
                )

    def take(self, tenant: str, amount: int) -> None:
        """
        Raises:
            LimitReached: as `check`.
        """
        self.check(tenant, amount)
        self.held += amount
        self._tenants[tenant] = self._tenants.get(tenant, 0) + amount

    def give_back(self, tenant: str, amount: int) -> None:
        self.held -= amount
        self._tenants[tenant] -= amount
        if not self._tenants[tenant]:
            del self._tenants[tenant]


class Share:
    """What one request holds of a budget; given back at the end of a `with`."""

    def __init__(self, budget: ByteBudget, tenant: str) -> None:
        self._budget = budget
        self.tenant = tenant
        self._held = 0

    def check(self, amount: int) -> None:
        """
        Raises:
            LimitReached: if there is no room for `amount` bytes.
        """
        self._budget.check(self.tenant, amount)

    def take(self, amount: int) -> None:
        """
        Raises:
            LimitReached: as `check`.
        """
        self._budget.take(self.tenant, amount)
        self._held += amount

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._budget.give_back(self.tenant, self._held)


class Bodies:
    """Reads and decodes a process's request bodies. Called on one event loop."""

    def __init__(self, limits: LimitsSection) -> None:
        self._budget = ByteBudget("max_body_bytes", limits.max_body_bytes_per_tenant, limits.max_body_bytes)
        self.most = int(min(limits.max_request_bytes, self._budget.most))
        """Size of the largest body ever accepted, in bytes."""
        self._threads = TenantThreads("bodies", _DECODING_THREADS, per_tenant=1)

    @property
    def bytes_held(self) -> int:
        return self._budget.held

    def share(self, tenant: str) -> Share:
        """For a `with` around a request's body, from the first byte until it has been decoded."""
        return Share(self._budget, tenant)

    async def read(self, request: Request, share: Share, most: int = MAX_PLAIN_BYTES) -> bytes:
        """The body, decompressed.

        Raises:
            TooLarge: before or after decompression.
            LimitReached: if there is no room for it now.
            InvalidRequest: if its compression is unknown.
            HTTPException: 408, if it arrives too slowly.
        """
        most = min(most, self.most)
        body = await read_raw(request, most, share)
        match request.headers.get("content-encoding", "identity").lower():
            case "identity" | "":
                return body
            case "zstd":
                size = max(len(body), codec.decompressed_size(body) or INLINE_BYTES + 1)
                plain = await self.do(share.tenant, size, lambda: codec.decompress(body, most))
                share.take(len(plain))
                return plain
            case other:
                raise InvalidRequest(f"Content-Encoding: {other[:40]!r} is not known here; use zstd or none")

    async def decode(self, tenant: str, posted: Posted, max_context_length: int) -> tuple[m.Operation, bytes]:
        """An operation and its digest, made in one go since both take long for a large one.

        Raises:
            InvalidRequest, TooLarge: if it can't be read, or is larger than such an operation needs.
        """
        size, most = len(posted.body), most_bytes(posted.endpoint.request, max_context_length)
        if size > most:
            raise TooLarge(f"{posted.endpoint.path}: a body of {size} bytes; at most {most}")
        return await self.do(tenant, size, lambda: _decode(posted, max_context_length))

    async def do(self, tenant: str, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on `size` bytes. Large ones are worked on in threads, one at a time per tenant."""
        return work() if size <= INLINE_BYTES else await self._threads.run(tenant, work)


async def read_raw(request: Request, most: int, share: Share) -> bytes:
    """The body as it was sent; raises as `Bodies.read`."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and len(stated) < 20:
        if int(stated) > most:
            raise _too_large(most)
        share.check(int(stated))
    received = bytearray()  # not a list of chunks: of a few bytes each, they would take many times the memory
    end = asyncio.get_running_loop().time() + BODY_SECONDS
    try:
        async with asyncio.timeout(PART_SECONDS) as deadline:
            part_end = PART_BYTES
            async for chunk in request.stream():
                if len(received) + len(chunk) > most:
                    raise _too_large(most)
                share.take(len(chunk))
                received += chunk
                if len(received) >= part_end:
                    part_end = len(received) + PART_BYTES
                    deadline.reschedule(min(asyncio.get_running_loop().time() + PART_SECONDS, end))
    except TimeoutError as error:
        raise HTTPException(
            408,
            f"body: it comes too slowly: each {PART_BYTES} bytes of it, and its end, must come within "
            f"{PART_SECONDS:g} s, and all of it within {BODY_SECONDS:g} s; send fewer datums at once, or find a faster "
            "line",
            {"Connection": "close"},
        ) from error
    return bytes(received)


def _too_large(most: int) -> TooLarge:
    return TooLarge(
        f"body: more than {most} bytes; send fewer datums at once, or shorter metadata "
        "(limits.max_request_bytes is the most that this server takes of training passes)"
    )


def most_bytes(request: type[m.Operation], max_context_length: int) -> int:
    """The largest plausible body of such a request. (Passes are bounded only by the server's limit.)"""
    if request is m.ForwardBackwardRequest:
        return 2**62
    if request is m.SampleRequest:
        return MAX_PLAIN_BYTES + _TOKEN_BYTES * (max_context_length + _MAX_TARGETS)
    return MAX_PLAIN_BYTES


def _decode(posted: Posted, max_context_length: int) -> tuple[m.Operation, bytes]:
    if posted.endpoint.body == "json":
        check_json(posted.body, posted.endpoint.request, max_context_length)
    operation = codec.decode(posted.endpoint.request, posted.body)
    return operation, operations.digest(operation)


def check_json(body: bytes, request: type[object], max_context_length: int = 0) -> None:
    """Check that a JSON body is small enough to be parsed: a few of its bytes can become objects of hundreds.

    Raises:
        TooLarge: if it has more values, or more objects, than such a request needs.
    """
    if len(body) <= _MAX_OBJECTS:
        return
    most = _MAX_PLAIN_VALUES
    if request is m.SampleRequest:
        most += max_context_length + _MAX_TARGETS
    if (values := body.count(b",") + body.count(b"[")) > most:
        raise TooLarge(f"body: a JSON of {values} values, more than {most}; ask for less at once")
    if (objects := body.count(b"{")) > _MAX_OBJECTS:
        raise TooLarge(f"body: a JSON of {objects} objects, more than {_MAX_OBJECTS}; ask for less at once")


# ---------------------------------------------------------------- replies

# How much of a reply is in a connection's buffer at most, besides the operating system's.
REPLY_PART_BYTES = 2**18


class BytesReply(Response):
    """A body sent in parts, each once the client has read the previous ones. So a large body that many clients ask
    for, and don't read, is in memory once.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        start = 0
        while len(self.body) - start > REPLY_PART_BYTES:
            part = self.body[start : start + REPLY_PART_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
            start += REPLY_PART_BYTES
        await send({"type": "http.response.body", "body": self.body[start:]})
