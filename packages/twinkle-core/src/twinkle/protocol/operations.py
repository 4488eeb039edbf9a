"""Several operations on runs in one request, and what became of each in the reply: `POST /operations`.

It is no other way to do anything: each operation is what its own path takes, and each reply what that path, or a poll
for its result, would have said. It spares a training step three round trips of four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from google.protobuf.message import DecodeError

from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.endpoints import OPERATIONS, Endpoint
from twinkle.protocol.errors import InvalidRequest, TooLarge

PATH = "/operations"
MAX_OPERATIONS = 32

# What may stand in such a request: what a run does in order.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint for endpoint in OPERATIONS if endpoint.request in get_args(m.Ordered)
}


@dataclass(frozen=True)
class Posted:
    """An operation as it is sent.

    Attributes:
        body: as the endpoint's own path takes it, not compressed.
    """

    endpoint: Endpoint
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What became of an operation.

    Attributes:
        request_id: of its promise; empty if it was refused.
        status, content_type, body: of the answer; status 408 says that there is no result yet.
    """

    request_id: str
    status: int
    content_type: str
    body: bytes


def encode_request(operations: Sequence[Posted]) -> bytes:
    return pb.OperationsRequest(
        operations=[pb.Operation(path=posted.endpoint.path, body=posted.body) for posted in operations]
    ).SerializeToString()


def decode_request(body: bytes) -> list[Posted]:
    """
    Raises:
        InvalidRequest: if the bytes are no such request, or name a path that can't stand in one.
        TooLarge: if there are too many.
    """
    try:
        message = pb.OperationsRequest.FromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"body: not a protobuf OperationsRequest ({error})") from error
    if len(message.operations) > MAX_OPERATIONS:
        raise TooLarge(
            f"operations: {len(message.operations)}, more than {MAX_OPERATIONS}; send fewer at once"
        )
    for operation in message.operations:
        if operation.path not in ENDPOINTS:
            raise InvalidRequest(
                f"operations: {operation.path[:80]!r} can't stand here; known are {', '.join(ENDPOINTS)}"
            )
    return [Posted(ENDPOINTS[operation.path], operation.body) for operation in message.operations]


def encode_reply(replies: Sequence[Reply]) -> bytes:
    return pb.OperationsReply(
        replies=[
            pb.OperationReply(
                request_id=reply.request_id,
                status=reply.status,
                content_type=reply.content_type,
                body=reply.body,
            )
            for reply in replies
        ]
    ).SerializeToString()


def decode_reply(body: bytes) -> list[Reply]:
    return [
        Reply(reply.request_id, reply.status, reply.content_type, reply.body)
        for reply in pb.OperationsReply.FromString(body).replies
    ]
