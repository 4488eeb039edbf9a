"""Operations over HTTP: decodes and submits their bodies, and encodes their results.

`POST /operations` takes several and waits for their results. Each operation's own path answers with a promise;
`POST /retrieve_future` waits for its result.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Sequence
from typing import get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from twinkle.protocol import codec, operations, results
from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded
from twinkle.protocol.endpoints import JSON, OPERATIONS, PREFIX, PROTOBUF, Endpoint
from twinkle.protocol.errors import InvalidRequest, TwinkleError
from twinkle.protocol.operations import Posted, Reply
from twinkle.server.gateway.authentication import Authenticator
from twinkle.server.gateway.errors import twinkle_error
from twinkle.server.gateway.hang_ups import while_connected
from twinkle.server.gateway.http import Bodies, BytesReply, check_json, most_bytes
from twinkle.server.gateway.port import ServicePort
from twinkle.server.scheduling.futures import Fetched

# Clients give up a long poll after 45 s, and poll again at once if it ends without a result.
LONG_POLL_SECONDS = 25.0
# Disconnects are not watched for at first: most results are there sooner, and watching costs two tasks.
_UNWATCHED_SECONDS = 1.0

# Larger results are first announced to clients that ask for that, and not sent in the reply to several operations: a
# poll's reply shares its bytes with all that ask for them, and is fetched when there is room for it.
INLINE_BYTES = 2**20

# How old what is known of the models' context lengths may be.
_CONTEXT_SECONDS = 30.0

# Results larger than this, in protobuf, are not written as JSON: Python takes thirty times their size to do so.
MAX_JSON_BYTES = 8 * 2**20


class Operations:
    """The routes of operations and of their results."""

    def __init__(self, service: ServicePort, authenticator: Authenticator, bodies: Bodies) -> None:
        self._service = service
        self._authenticator = authenticator
        self._bodies = bodies
        self._context_length = 0
        self._context_read_at = -math.inf

    def routes(self) -> list[Route]:
        # Routes are tried in order: those of a training loop first.
        handlers = {operations.PATH: self._post_together, "/retrieve_future": self._retrieve_future}
        for endpoint in OPERATIONS:
            handlers[endpoint.path] = functools.partial(self._post, endpoint)
        return [Route(PREFIX + path, handler, methods=["POST"]) for path, handler in handlers.items()]

    async def _post(self, endpoint: Endpoint, request: Request) -> Response:
        """An operation on its own path."""
        tenant = await self._authenticator.tenant_of(request)
        most = most_bytes(endpoint.request, await self._context_of(endpoint))
        with self._bodies.share(tenant) as share:
            body = await self._bodies.read(request, share, most)
            promise = await self._submit(tenant, Posted(endpoint, body))
        return Response(codec.encode_json(promise), media_type=JSON)

    async def _post_together(self, request: Request) -> Response:
        tenant = await self._authenticator.tenant_of(request)
        accepted: list[m.Promise | TwinkleError] = []
        with self._bodies.share(tenant) as share:
            body = await self._bodies.read(request, share, self._bodies.most)
            for posted in operations.decode_request(body):  # sequentially, since that is their order
                try:
                    accepted.append(await self._submit(tenant, posted))
                except TwinkleError as error:
                    accepted.append(error)
        replies = await self._replies(tenant, request, accepted)
        return BytesReply(operations.encode_reply(replies), media_type=PROTOBUF)

    async def _replies(
        self, tenant: str, request: Request, accepted: Sequence[m.Promise | TwinkleError]
    ) -> list[Reply]:
        promised = [promise.request_id for promise in accepted if isinstance(promise, m.Promise)]
        try:
            outcomes = iter(await self._wait(tenant, request, promised, INLINE_BYTES))
        except TwinkleError as error:
            outcomes = itertools.repeat(error)
        return [
            _reply("", each) if isinstance(each, TwinkleError) else _reply(each.request_id, next(outcomes))
            for each in accepted
        ]

    # ------------------------------------------------------------ submitting

    async def _submit(self, tenant: str, posted: Posted) -> m.Promise:
        """
        Raises:
            TwinkleError: the service's, or why the body can't be read.
        """
        context = await self._context_of(posted.endpoint)
        try:
            operation, digest = await self._bodies.decode(tenant, posted, context)
        except InvalidRequest:
            await self._consume_seq_id(tenant, posted)
            raise
        if isinstance(operation, m.LoadWeightsRequest):
            operation = await self._authenticator.with_access(operation)
        return await self._service.submit(tenant, operation, posted.body, digest)

    async def _consume_seq_id(self, tenant: str, posted: Posted) -> None:
        """Let an unreadable request on a run take its place in the run's order: the client goes on to the next
        `seq_id`, which would otherwise wait for this one forever.
        """
        if posted.endpoint.request not in get_args(m.Ordered):
            return
        is_pass = posted.endpoint.request is m.ForwardBackwardRequest
        read = codec.place_of_forward_backward if is_pass else codec.place_of_json
        place = await self._bodies.do(tenant, len(posted.body), lambda: read(posted.body))
        if place is not None:
            # A pass without datums is always refused, and its id consumed.
            refused = m.ForwardBackwardRequest(place.model_id, place.seq_id, [], "")
            with contextlib.suppress(TwinkleError):
                await self._service.submit(tenant, refused)

    async def _context_of(self, endpoint: Endpoint) -> int:
        """The longest context length of a model, if it bounds the body. Models may be added while the server runs."""
        if endpoint.request is not m.SampleRequest:
            return 0
        if time.monotonic() - self._context_read_at > _CONTEXT_SECONDS:
            reply = await self._service.ask("", m.GetServerCapabilities())
            self._context_length = max(model.max_context_length or 0 for model in reply.supported_models)
            self._context_read_at = time.monotonic()
        return self._context_length

    # ------------------------------------------------------------ results

    async def _retrieve_future(self, request: Request) -> Response:
        tenant = await self._authenticator.tenant_of(request)
        with self._bodies.share(tenant) as share:
            body = await self._bodies.read(request, share)
        check_json(body, m.RetrieveFutureRequest)
        wanted = codec.decode_json(m.RetrieveFutureRequest, body)
        most = INLINE_BYTES if wanted.allow_metadata_only else None
        [outcome] = await self._wait(tenant, request, [wanted.request_id], most)
        if isinstance(outcome, TwinkleError):
            raise outcome
        status, content_type, encoded = _encode(outcome)
        if isinstance(outcome, Encoded) and content_type == PROTOBUF and _wants_json(request):
            return BytesReply(await self._as_json(tenant, outcome), media_type=JSON)
        return BytesReply(encoded, status, media_type=content_type)

    async def _wait(
        self, tenant: str, request: Request, request_ids: Sequence[str], most_bytes: int | None
    ) -> list[Fetched]:
        """As `ServicePort.fetch`, for the length of a long poll and while the client of `request` is connected."""
        outcomes = await self._service.fetch(tenant, request_ids, _UNWATCHED_SECONDS, most_bytes)
        waiting = [outcome.request_id for outcome in outcomes if isinstance(outcome, m.TryAgain)]
        if not waiting:
            return outcomes
        longer = self._service.fetch(tenant, waiting, LONG_POLL_SECONDS - _UNWATCHED_SECONDS, most_bytes)
        later = iter(await while_connected(request, longer))
        return [next(later) if isinstance(outcome, m.TryAgain) else outcome for outcome in outcomes]

    async def _as_json(self, tenant: str, result: Encoded) -> bytes:
        """
        Raises:
            InvalidRequest: if the result would take too much memory to write as JSON.
        """
        if len(result.body) > MAX_JSON_BYTES:
            raise InvalidRequest(
                f"Accept: this result is {len(result.body)} bytes in {PROTOBUF}, and no more than {MAX_JSON_BYTES} are "
                f"written as JSON; ask for {PROTOBUF}"
            )
        return await self._bodies.do(
            tenant, len(result.body), functools.partial(results.result_as_json, result)
        )


def _encode(outcome: Encoded | m.TryAgain | m.CompleteMetadata) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    if isinstance(outcome, Encoded):
        return 200, codec.CONTENT_TYPES.get(outcome.kind, JSON), outcome.body
    # The SDK takes 408 as "ask again" without a warning in the user's log.
    return 408 if isinstance(outcome, m.TryAgain) else 200, JSON, codec.encode_json(outcome)


def _reply(request_id: str, outcome: Fetched | TwinkleError) -> Reply:
    if isinstance(outcome, TwinkleError):
        response = twinkle_error(outcome)
        return Reply(request_id, response.status_code, JSON, bytes(response.body))
    if isinstance(outcome, m.CompleteMetadata):
        outcome = m.TryAgain(request_id=request_id)
    return Reply(request_id, *_encode(outcome))


def _wants_json(request: Request) -> bool:
    """Whether the client accepts JSON and not protobuf; one that names neither accepts both."""
    accepted = request.headers.get("accept", "")
    return JSON in accepted and PROTOBUF not in accepted and "*/*" not in accepted
