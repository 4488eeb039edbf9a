"""Operations on the wire: their bodies and results, several of them in one request, and when two are the same.

`POST /operations` is not a second API: each entry is exactly the body of its own endpoint, and each reply is what that
endpoint, or a poll for its result, would have answered. It saves a training step three round trips of four, and a
sample one of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, get_args

from google.protobuf.message import DecodeError
from pydantic import BaseModel

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.endpoints import JSON, OPERATIONS, PROTOBUF, Endpoint
from twinkle.protocol.errors import InvalidRequest, TooLarge
from twinkle.protocol.types import EncodedTextChunk, ForwardBackwardOutput, ModelInput, SampleResponse

PATH = "/operations"
MAX_OPERATIONS = 32

# What may stand in such a request: what a run does in order, and samples.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in OPERATIONS
    if endpoint.request in (*get_args(m.Ordered), m.SampleRequest)
}

# ---------------------------------------------------------------- one operation


@dataclass(frozen=True)
class Posted:
    """An operation as it is sent.

    Attributes:
        body: as the endpoint's own path takes it, not compressed.
    """

    endpoint: Endpoint
    body: bytes


def encode(request: m.Operation) -> bytes:
    """An operation's body."""
    if isinstance(request, m.ForwardBackwardRequest):
        return codec.encode_forward_backward(request)
    return codec.encode_json(request)


def decode(posted: Posted) -> m.Operation:
    """
    Raises:
        InvalidRequest, TooLarge: if it can't be read, or would take too much memory.
    """
    kind = posted.endpoint.request
    if kind is m.ForwardBackwardRequest:
        return codec.decode_forward_backward(posted.body)
    return cast(m.Operation, codec.decode_json(cast(Any, kind), posted.body))


# May differ between a request and its duplicate: the gateway signs a new token each time.
_NOT_COMPARED = {"weights_access_token"}


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
                found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                found.update(tensor.array.tobytes())
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


# ---------------------------------------------------------------- results


@dataclass(frozen=True, eq=False)
class Encoded:
    """A result or failure, encoded once for whoever stores, sends or reads it.

    Attributes:
        kind: name of its type.
    """

    kind: str
    body: bytes

    @property
    def content_type(self) -> str:
        return PROTOBUF if self.kind in ("ForwardBackwardOutput", "SampleResponse") else JSON


_RESULTS: dict[str, type[m.Result]] = {endpoint.result.__name__: endpoint.result for endpoint in OPERATIONS}

Decoded: TypeAlias = m.Result | m.Failure


def encode_result(result: Decoded) -> Encoded:
    if isinstance(result, ForwardBackwardOutput):
        body = codec.encode_forward_backward_output(result)
    else:
        body = (
            codec.encode_sample(result) if isinstance(result, SampleResponse) else codec.encode_json(result)
        )
    return Encoded(type(result).__name__, body)


def decode_result(encoded: Encoded) -> Decoded:
    kind = _RESULTS.get(encoded.kind, m.Failure)
    if kind is ForwardBackwardOutput:
        return codec.decode_forward_backward_output(encoded.body)
    if kind is SampleResponse:
        return codec.decode_sample(encoded.body)
    return cast(Decoded, codec.decode_json(cast(Any, kind), encoded.body))


# ---------------------------------------------------------------- several in one request


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
