"""How times and users' own notes are written in replies, and how long notes may be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from twinkle.protocol.errors import InvalidRequest


def iso(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def texts(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Metadata as it was given, but texts only: what isn't one is written as JSON, since the SDK reads nothing else."""
    if metadata is None:
        return None
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}


def check_metadata(metadata: Mapping[str, Any] | None, most: int | None) -> None:
    """
    Args:
        most: bytes, as JSON.

    Raises:
        InvalidRequest: if it is longer.
    """
    if metadata and most is not None:
        size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode(errors="replace"))
        if size > most:
            raise InvalidRequest(
                f"user_metadata: {size} bytes as JSON; at most {most} (limits.max_metadata_bytes); keep what is large "
                "in a file of your own, and its name here"
            )
