"""Limits on the number and size of checkpoints, counting those being written."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from twinkle.protocol.errors import QuotaReached
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.config import LimitsSection
from twinkle.server.store import tables
from twinkle.server.store.database import Database
from twinkle.server.store.retry import retry_while_unavailable


class CheckpointQuota:
    """For named checkpoints; single-threaded: called on one event loop."""

    def __init__(self, database: Database, limits: LimitsSection) -> None:
        self._database = database
        self._limits = limits
        self._under_way: dict[CheckpointUri, tuple[str, int]] = {}  # tenant and bytes
        self._asking = asyncio.Lock()  # two concurrent checks must not both get the last place

    @contextlib.asynccontextmanager
    async def place_for(self, tenant: str, uri: CheckpointUri, size: int) -> AsyncGenerator[None, None]:
        """Reserve a place: a new checkpoint is written inside this, and counts from the start.

        Args:
            size: in bytes, approximately.

        Raises:
            QuotaReached: if there would be too many.
        """
        async with self._asking:
            await self._check(tenant)
            self._under_way[uri] = tenant, size
        try:
            yield
        finally:
            self._under_way.pop(uri, None)

    async def _check(self, tenant: str) -> None:
        limits = self._limits
        for suffix, whose, most, most_bytes in (
            (
                "_per_tenant",
                tenant,
                limits.max_checkpoints_per_tenant,
                limits.max_checkpoint_bytes_per_tenant,
            ),
            ("", tables.EVERYBODY, limits.max_checkpoints, limits.max_checkpoint_bytes),
        ):
            if most is None and most_bytes is None:
                continue
            count, size = await self._used(whose)
            for name, used, limit in (
                ("max_checkpoints", count, most),
                ("max_checkpoint_bytes", size, most_bytes),
            ):
                if limit is not None and used >= limit:
                    raise QuotaReached(
                        f"limits.{name}{suffix}: checkpoints take {used} already, and this server allows {limit}; "
                        "delete some first, or give them a ttl"
                    )

    async def _used(self, whose: str) -> tuple[int, int]:
        """Checkpoints and bytes."""
        # One being written counts as such; its row, which may exist by now, doesn't.
        under_way = dict(self._under_way)
        total = await retry_while_unavailable(
            lambda: self._database.checkpoint_total(whose, time.time(), besides=list(under_way))
        )
        own = [size for tenant, size in under_way.values() if whose in (tenant, tables.EVERYBODY)]
        return total.count + len(own), total.size_bytes + sum(own)
