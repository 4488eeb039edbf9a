"""Memory that runs out where a test wants it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def fail_when(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, is_too_much: Callable[..., bool]
) -> list[int]:
    """Memory runs out in a function whenever its arguments are too much; returns a list that grows with each time."""
    real, failed = getattr(target, name), list[int]()

    def failing(*args: Any) -> Any:
        if is_too_much(*args):
            failed.append(1)
            raise torch.OutOfMemoryError("no memory left")
        return real(*args)

    monkeypatch.setattr(target, name, failing)
    return failed
