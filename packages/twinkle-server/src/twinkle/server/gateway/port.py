"""What the gateway calls: the service, in this process or another."""

from collections.abc import Sequence
from typing import Protocol

from twinkle.protocol import messages as m
from twinkle.server.scheduling.futures import Fetched
from twinkle.server.tokens import Download


class ServicePort(Protocol):
    """All methods raise the service's `TwinkleError`s."""

    async def ready(self) -> None:
        """Raises `Unavailable` if it isn't."""
        ...

    async def metrics(self) -> str:
        """In Prometheus' text format."""
        ...

    async def submit(
        self, tenant: str, request: m.Operation, body: bytes | None = None, digest: bytes | None = None
    ) -> m.Promise: ...

    async def fetch(
        self, tenant: str, request_ids: Sequence[str], timeout: float, most_bytes: int | None = None
    ) -> list[Fetched]: ...

    async def ask(self, tenant: str, query: m.Query[m.ReplyT]) -> m.ReplyT: ...

    async def download_sizes(self, download: Download) -> dict[str, int]: ...

    async def download_part(self, download: Download, name: str, offset: int, size: int) -> bytes: ...
