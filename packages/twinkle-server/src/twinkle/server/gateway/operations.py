"""Several operations in one request: each is submitted in turn, and the reply waits for all their results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from twinkle.protocol import messages as m
from twinkle.protocol import operations
from twinkle.protocol.endpoints import PROTOBUF
from twinkle.protocol.errors import TwinkleError
from twinkle.protocol.operations import Posted, Reply
from twinkle.server.gateway.bodies import Bodies
from twinkle.server.gateway.errors import twinkle_error
from twinkle.server.gateway.replies import BytesReply
from twinkle.server.gateway.tenants import Doorkeeper


def handler(
    doorkeeper: Doorkeeper,
    bodies: Bodies,
    submit: Callable[[str, Posted], Awaitable[m.Promise]],
    result: Callable[[str, str], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """
    Args:
        submit: a tenant's operation, as its own path does it.
        result: of a tenant's request id, as a poll for it answers.
    """

    async def handle(request: Request) -> Response:
        tenant = await doorkeeper.tenant_of(request)
        accepted: list[m.Promise | Response] = []
        with bodies.share(tenant) as share:
            body = await bodies.read(request, share, bodies.most)
            for operation in operations.decode_request(body):  # one after the other: that is their order
                try:
                    accepted.append(await submit(tenant, operation))
                except TwinkleError as error:
                    accepted.append(twinkle_error(error))
            del body

        async def reply(promise: m.Promise | Response) -> Reply:
            if isinstance(promise, Response):
                return _reply("", promise)
            try:
                return _reply(promise.request_id, await result(tenant, promise.request_id))
            except TwinkleError as error:
                return _reply(promise.request_id, twinkle_error(error))

        replies = await asyncio.gather(*(reply(promise) for promise in accepted))
        return BytesReply(operations.encode_reply(replies), media_type=PROTOBUF)

    return handle


def _reply(request_id: str, response: Response) -> Reply:
    return Reply(
        request_id, response.status_code, response.headers.get("content-type", ""), bytes(response.body)
    )
