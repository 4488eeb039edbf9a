"""Request bodies, never more of them in memory than the limits, and none for longer than it takes to send them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, TooLarge
from twinkle.server.config import LimitsSection
from twinkle.server.scheduling.limits import ByteBudget, Share
from twinkle.server.scheduling.threads import TenantThreads

T = TypeVar("T")

# The most that a request without tokens or tensors needs: what Python makes of JSON can be twenty times as large.
MAX_PLAIN_BYTES = 2**20
# What a JSON body may consist of: values in lists and objects, and objects, which cost most.
_MAX_PLAIN_VALUES = 2**16
_MAX_OBJECTS = 2**13
# Of a sample: tokens to score at the positions of its prompt, and what a token takes in JSON.
_MAX_TARGETS = 2**20
_TOKEN_BYTES = 8

# Each such part of a body, and what is left of it in the end, must have come within so many seconds; and all of it.
PART_BYTES = 2**19
PART_SECONDS = 30.0
BODY_SECONDS = 900.0

# What is larger is decompressed and decoded in a thread: a large body must not keep all others waiting.
INLINE_BYTES = 2**16
_DECODING_THREADS = 2


class Bodies:
    """Reads and decodes the bodies of a process. Called on one event loop."""

    def __init__(self, limits: LimitsSection) -> None:
        self._budget = ByteBudget("max_body_bytes", limits.max_body_bytes_per_tenant, limits.max_body_bytes)
        self.most = int(min(limits.max_request_bytes, self._budget.most))
        """Bytes of the largest body that is ever taken."""
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
            LimitReached: if there is no room for it just now.
            InvalidRequest: if it is compressed in a way that isn't known here.
            HTTPException: 408, if it comes too slowly.
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

    async def do(self, tenant: str, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on `size` bytes; in a thread if that is much, one after the other for each tenant."""
        return work() if size <= INLINE_BYTES else await self._threads.run(tenant, work)


async def read_raw(request: Request, most: int, share: Share) -> bytes:
    """The body as it was sent; raises as `Bodies.read`."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and len(stated) < 20:
        if int(stated) > most:
            raise _too_large(most)
        share.check(int(stated))
    received = bytearray()  # not a list of chunks: each would cost more than a chunk of a few bytes
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
    """Of a request's body: what it can mean at most, but for training passes, whose limit is the server's."""
    if request is m.ForwardBackwardRequest:
        return 2**62
    if request is m.SampleRequest:
        return MAX_PLAIN_BYTES + _TOKEN_BYTES * (max_context_length + _MAX_TARGETS)
    return MAX_PLAIN_BYTES


def check_json(body: bytes, request: type[object], max_context_length: int = 0) -> None:
    """That a JSON body is small enough to be parsed: a few bytes of it become objects of hundreds.

    Raises:
        TooLarge: if it has more values, or more objects, than such a request can need.
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
