"""Request bodies, never more of them in memory than the limit."""

from starlette.requests import Request

from twinkle.protocol import codec
from twinkle.protocol.errors import InvalidRequest, TooLarge

# The most that a request without tokens or tensors needs: what Python makes of JSON can be twenty times as large.
MAX_PLAIN_BYTES = 2**20


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, decompressed.

    Raises:
        TooLarge: before or after decompression.
        InvalidRequest: if it is compressed in a way that isn't known here.
    """
    received = bytearray()  # not a list of chunks: each would cost more than a chunk of a few bytes
    async for chunk in request.stream():
        if len(received) + len(chunk) > max_bytes:
            raise TooLarge(
                f"body: more than {max_bytes} bytes; send fewer datums at once, or shorter metadata "
                "(limits.max_request_bytes is the most that this server takes)"
            )
        received += chunk
    body = bytes(received)
    del received
    match request.headers.get("content-encoding", "identity").lower():
        case "identity" | "":
            return body
        case "zstd":
            return codec.decompress(body, max_bytes)
        case other:
            raise InvalidRequest(f"Content-Encoding: {other[:40]!r} is not known here; use zstd or none")
