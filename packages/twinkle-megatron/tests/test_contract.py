"""The contract of every training backend, on every layout of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from rank_processes import RankProcesses

from twinkle.server.backends import contract


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "TP2xPP2", "TP2+SP", "DP2", "DP2xTP2", "DP2xPP2"])
def test_contract(
    layout: str,
    check: contract.Check,
    ranks: Callable[[Path, str], RankProcesses],
    tiny_model_dir: Path,
) -> None:
    check(cast("contract.Factory", ranks(tiny_model_dir, layout).backend))
