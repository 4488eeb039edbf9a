"""Request bodies, never more of them in memory than the limit."""

from starlette.requests import Request

from twinkle.protocol import codec
from twinkle.protocol.errors import InvalidRequest, TooLarge


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, decompressed.

    Raises:
        TooLarge: before or after decompression.
        InvalidRequest: if it is compressed in a way that isn't known here.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise TooLarge(
                f"body: more than {max_bytes} bytes (limits.max_request_bytes); send fewer datums at once"
            )
        chunks.append(chunk)
    body = b"".join(chunks)
    match request.headers.get("content-encoding", "identity").lower():
        case "identity" | "":
            return body
        case "zstd":
            return codec.decompress(body, max_bytes)
        case other:
            raise InvalidRequest(f"Content-Encoding: {other[:40]!r} is not known here; use zstd or none")
