"""How times and users' metadata are written in replies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def iso(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def texts(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Metadata with strings only: other values are written as JSON, since the SDK reads nothing else."""
    if metadata is None:
        return None
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
