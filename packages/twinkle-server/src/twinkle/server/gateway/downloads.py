"""Files for whoever holds a signed address: one file as it is, or several in a tar."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from email.utils import format_datetime

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import PREFIX
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.tenants import Doorkeeper
from twinkle.server.service.downloads import archive_end, archive_header, archive_padding, archive_size
from twinkle.server.tokens import ARCHIVE, Download, Signer

_PART_BYTES = 4 * 2**20


def routes(
    service: ServicePort, doorkeeper: Doorkeeper, signer: Signer, public_url: str | None
) -> list[Route]:
    """The download route itself, and the archive address that SDKs before 0.36 ask for."""

    async def download(request: Request) -> Response:
        wanted = signer.read_download(request.path_params["token"])
        sizes = await service.download_sizes(wanted)
        if wanted.file == ARCHIVE:
            body, length, kind = _tar(service, wanted, sizes), archive_size(sizes), "application/x-tar"
        else:
            length, kind = sizes[wanted.file], "application/octet-stream"
            body = _file(service, wanted, wanted.file, length)
        return StreamingResponse(body, media_type=kind, headers={"Content-Length": str(length)})

    async def archive(request: Request) -> Response:
        query = codec.decode_query(m.GetCheckpointArchive, b"", request.path_params)
        reply = await service.ask(await doorkeeper.tenant_of(request), query)
        [url] = with_base(reply, request, public_url).urls.values()
        headers = {"Location": url, "Expires": format_datetime(reply.expires_at, usegmt=True)}
        return Response(status_code=302, headers=headers)

    return [
        Route(PREFIX + "/download/{token}/{name}", download, methods=["GET"]),
        Route(PREFIX + m.CHECKPOINT + "/archive", archive, methods=["GET"]),
    ]


def with_base(
    reply: m.ExternalWeightsUrls, request: Request, public_url: str | None
) -> m.ExternalWeightsUrls:
    """The reply with whole addresses: below `public_url`, or else where the request was sent to."""
    base = (public_url or str(request.base_url)).rstrip("/") + PREFIX
    return reply.model_copy(update={"urls": {name: base + path for name, path in reply.urls.items()}})


async def _file(service: ServicePort, wanted: Download, name: str, length: int) -> AsyncGenerator[bytes]:
    offset = 0
    while offset < length:
        part = await service.download_part(wanted, name, offset, min(_PART_BYTES, length - offset))
        if not part:
            return  # it has become shorter: the client sees that the length is wrong
        yield part
        offset += len(part)


async def _tar(service: ServicePort, wanted: Download, sizes: dict[str, int]) -> AsyncGenerator[bytes]:
    for name, size in sizes.items():
        yield archive_header(name, size)
        async for part in _file(service, wanted, name, size):
            yield part
        yield archive_padding(size)
    yield archive_end()
