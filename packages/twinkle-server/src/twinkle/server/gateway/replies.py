"""Replies that are bytes in memory, which others may ask for at the same time."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# What of a reply lies in a connection's buffer at most, beside what the operating system has.
PART_BYTES = 2**18


class BytesReply(Response):
    """A body that is sent in parts, each when the client has read those before: of a large one that many ask for, and
    nobody reads, there is one copy all the same.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        start = 0
        while len(self.body) - start > PART_BYTES:
            part = self.body[start : start + PART_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
            start += PART_BYTES
        await send({"type": "http.response.body", "body": self.body[start:]})
