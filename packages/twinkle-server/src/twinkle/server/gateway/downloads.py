"""Files for the holder of a signed URL: a single file, or several in a tar."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncGenerator
from email.utils import format_datetime

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import PREFIX
from twinkle.server.gateway.authentication import Authenticator
from twinkle.server.gateway.port import ServicePort
from twinkle.server.tokens import ARCHIVE, Download, Signer

_PART_BYTES = 4 * 2**20


class Downloads:
    """The download route, and the archive URL that SDKs before 0.36 ask for."""

    def __init__(
        self, service: ServicePort, authenticator: Authenticator, signer: Signer, public_url: str | None
    ) -> None:
        """
        Args:
            public_url: prefix of the URLs; default: where the request was sent.
        """
        self._service = service
        self._authenticator = authenticator
        self._signer = signer
        self._public_url = public_url

    def routes(self) -> list[Route]:
        return [
            Route(PREFIX + "/download/{token}/{name}", self._download, methods=["GET"]),
            Route(PREFIX + m.CHECKPOINT + "/archive", self._archive, methods=["GET"]),
        ]

    def with_base(self, reply: m.ExternalWeightsUrls, request: Request) -> m.ExternalWeightsUrls:
        """The reply with absolute URLs."""
        base = (self._public_url or str(request.base_url)).rstrip("/") + PREFIX
        return reply.model_copy(update={"urls": {name: base + path for name, path in reply.urls.items()}})

    async def _download(self, request: Request) -> Response:
        wanted = self._signer.read_download(request.path_params["token"])
        sizes = await self._service.download_sizes(wanted)
        if wanted.file == ARCHIVE:
            body, length, kind = self._tar(wanted, sizes), archive_size(sizes), "application/x-tar"
        else:
            length, kind = sizes[wanted.file], "application/octet-stream"
            body = self._file(wanted, wanted.file, length)
        return StreamingResponse(body, media_type=kind, headers={"Content-Length": str(length)})

    async def _archive(self, request: Request) -> Response:
        query = codec.decode_query(m.GetCheckpointArchive, b"", request.path_params)
        reply = await self._service.ask(await self._authenticator.tenant_of(request), query)
        [url] = self.with_base(reply, request).urls.values()
        headers = {"Location": url, "Expires": format_datetime(reply.expires_at, usegmt=True)}
        return Response(status_code=302, headers=headers)

    async def _file(self, wanted: Download, name: str, length: int) -> AsyncGenerator[bytes]:
        offset = 0
        while offset < length:
            part = await self._service.download_part(wanted, name, offset, min(_PART_BYTES, length - offset))
            if not part:
                return  # it has become shorter: the client sees that the length is wrong
            yield part
            offset += len(part)

    async def _tar(self, wanted: Download, sizes: dict[str, int]) -> AsyncGenerator[bytes]:
        for name, size in sizes.items():
            yield archive_header(name, size)
            async for part in self._file(wanted, name, size):
                yield part
            yield archive_padding(size)
        yield archive_end()


# ---------------------------------------------------------------- archives

_BLOCK = tarfile.BLOCKSIZE


def archive_header(name: str, size: int) -> bytes:
    """What precedes a file in a tar."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def archive_padding(size: int) -> bytes:
    """What follows it."""
    return bytes(-size % _BLOCK)


def archive_end() -> bytes:
    return bytes(2 * _BLOCK)


def archive_size(sizes: dict[str, int]) -> int:
    files = sum(
        len(archive_header(name, size)) + size + len(archive_padding(size)) for name, size in sizes.items()
    )
    return files + len(archive_end())
