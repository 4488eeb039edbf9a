"""Several operations in one request, and the outcome of each in the reply: `POST /operations`.

Not a second API: each operation is exactly the body of its own endpoint, and each reply what that endpoint, or a poll
for the result, would have returned. It saves a training step three round trips of four.
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

# Only operations that a run applies in order may be sent this way.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint for endpoint in OPERATIONS if endpoint.request in get_args(m.Ordered)
}


@dataclass(frozen=True)
class Posted:
    """An operation to send.

    Attributes:
        body: the body of the endpoint's own path, uncompressed.
    """

    endpoint: Endpoint
    body: bytes


@dataclass(frozen=True)
class Reply:
    """The outcome of an operation.

    Attributes:
        request_id: its promise's; empty if it was refused.
        status, content_type, body: of the response; status 408 means that there is no result yet.
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
        InvalidRequest: if the bytes are no such request, or name another path.
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
