"""Operations, from a body to the service: read and decoded within the limits of their kind, then submitted."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import get_args

from starlette.requests import Request

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import Endpoint
from twinkle.protocol.errors import InvalidRequest, TooLarge, TwinkleError
from twinkle.protocol.operations import Posted
from twinkle.server.gateway.bodies import Bodies, check_json, most_bytes
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.tenants import Doorkeeper


@dataclass(eq=False)
class Intake:
    """Takes operations of tenants that are known."""

    service: ServicePort
    doorkeeper: Doorkeeper
    bodies: Bodies
    _context_length: int | None = None

    async def post(self, request: Request, endpoint: Endpoint, tenant: str) -> m.Promise:
        """An operation on its own path."""
        most = most_bytes(endpoint.request, await self._context_of(endpoint))
        with self.bodies.share(tenant) as share:
            body = await self.bodies.read(request, share, most)
            return await self.submit(tenant, Posted(endpoint, body))

    async def submit(self, tenant: str, posted: Posted) -> m.Promise:
        """An operation whose body has been read.

        Raises:
            TwinkleError: what the service says, or why it can't be read.
        """
        endpoint, body = posted.endpoint, posted.body
        context = await self._context_of(endpoint)
        if len(body) > (most := most_bytes(endpoint.request, context)):
            raise TooLarge(f"{endpoint.path}: a body of {len(body)} bytes; at most {most}")
        try:
            operation = await self.bodies.do(tenant, len(body), lambda: decode(endpoint, body, context))
        except InvalidRequest:
            await self._take_place(tenant, posted)
            raise
        return await self.service.submit(tenant, await self.doorkeeper.with_access(operation))

    async def _take_place(self, tenant: str, posted: Posted) -> None:
        """An unreadable request on a run still takes its place in the run's order: its client goes on to the next
        `seq_id`, which would wait for this one for ever.
        """
        if posted.endpoint.request not in get_args(m.Ordered):
            return
        body = posted.body
        is_pass = posted.endpoint.request is m.ForwardBackwardRequest
        read = codec.place_of_forward_backward if is_pass else codec.place_of_json
        place = await self.bodies.do(tenant, len(body), lambda: read(body))
        if place is not None:
            # A pass without datums is always refused, and its id consumed.
            with contextlib.suppress(TwinkleError):
                await self.service.submit(
                    tenant, m.ForwardBackwardRequest(place.model_id, place.seq_id, [], "")
                )

    async def _context_of(self, endpoint: Endpoint) -> int:
        """The model's context length, where it bounds the body."""
        if endpoint.request is not m.SampleRequest:
            return 0
        if self._context_length is None:
            reply = await self.service.ask("", m.GetServerCapabilities())
            assert isinstance(reply, m.ServerCapabilities), "the reply to that query"
            self._context_length = max(model.max_context_length or 0 for model in reply.supported_models)
        return self._context_length


def decode(endpoint: Endpoint, body: bytes, context_length: int) -> m.Operation:
    """
    Raises:
        InvalidRequest, TooLarge: if it can't be read, or is not worth it.
    """
    if endpoint.request is m.ForwardBackwardRequest:
        return codec.decode_forward_backward(body)
    check_json(body, endpoint.request, context_length)
    return codec.decode_json(endpoint.request, body)  # pyright: ignore
