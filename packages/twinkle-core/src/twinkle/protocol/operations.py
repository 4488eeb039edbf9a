"""Operations on the wire: several in one request, and when two are the same.

`POST /operations` is not a second API: each entry is exactly the body of its own endpoint, and each reply what that
endpoint, or a poll for its result, would have returned. It saves a training step three round trips of four, and a
sample one of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from google.protobuf.message import DecodeError
from pydantic import BaseModel

from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.endpoints import OPERATIONS, Endpoint
from twinkle.protocol.errors import InvalidRequest, TooLarge
from twinkle.protocol.types import EncodedTextChunk, ModelInput

PATH = "/operations"
MAX_OPERATIONS = 32

# Only operations that a run applies in order, and samples, may be sent this way.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in OPERATIONS
    if endpoint.request in (*get_args(m.Ordered), m.SampleRequest)
}


@dataclass(frozen=True)
class Posted:
    """An operation to send.

    Attributes:
        body: the body of the endpoint's own path, uncompressed.
    """

    endpoint: Endpoint
    body: bytes


# May differ between a request and its duplicate: the gateway signs a new token each time, and the SDK numbers the
# sampling session of an unnamed save anew whenever it sends it again.
_NOT_COMPARED = {"weights_access_token", "sampling_session_seq_id"}


def digest(request: m.Operation) -> bytes:
    """Identifies what a request asks for, in 16 bytes: a client that sends it again may encode and compress it
    differently. Journals keep digests, so it must not change from version to version.
    """
    found = hashlib.blake2b(digest_size=16)
    if isinstance(request, m.ForwardBackwardRequest):
        config = sorted(request.loss_fn_config.items())
        found.update(repr((request.loss_fn, request.forward_only, len(request.data), config)).encode())
        for datum in request.data:
            _add_tokens(found, datum.model_input)
            for name, tensor in sorted(datum.loss_fn_inputs.items()):
                array = tensor.array
                found.update(f"{name} {array.dtype} {list(array.shape)}".encode())
                found.update(array.tobytes())
    elif isinstance(request, m.SampleRequest):
        _add_tokens(found, request.prompt)
        found.update(_text(request, {"prompt"}))
    else:
        found.update(_text(request, _NOT_COMPARED))
    return found.digest()


def _text(request: BaseModel, exclude: set[str]) -> bytes:
    # Without defaults: a later version, which knows more fields, has to arrive at the same bytes.
    return request.model_dump_json(exclude=exclude, exclude_defaults=True).encode()


def _add_tokens(found: hashlib.blake2b, text: ModelInput) -> None:
    for chunk in text.chunks:
        found.update(f"{chunk.type} ".encode())
        if isinstance(chunk, EncodedTextChunk):
            found.update(f"{len(chunk.tokens)} ".encode())
            found.update(chunk.tokens.tobytes())


# ---------------------------------------------------------------- several in one request


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
