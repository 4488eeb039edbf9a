"""The contract of every training backend, on layouts of ranks: some that together have every kind, or all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from rank_processes import RankProcesses

from twinkle.server.backends import contract

CHOSEN = [
    *[("qwen3", layout) for layout in ("TP2+SP", "TP2xPP2", "DP2xPP2")],
    *[("qwen3_5", layout) for layout in ("TP2", "PP2")],
    ("qwen3_5_moe", "EP2"),
]
ALL = [
    *[
        ("qwen3", layout)
        for layout in ("TP1", "TP2", "PP2", "TP2xPP2", "TP2+SP", "DP2", "DP2xTP2", "DP2xPP2")
    ],
    *[("qwen3_5", layout) for layout in ("TP1", "TP2", "PP2", "TP2xPP2", "TP2+SP")],
    ("qwen3_5_moe", "EP2"),
]
# `hatch run layouts`: what a tenant's numbers are is looked at on all of them in any case (test_against_peft.py).
CASES = ALL if os.environ.get("TWINKLE_ALL_LAYOUTS") == "1" else CHOSEN


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("family", "layout"), CASES, ids=["-".join(case) for case in CASES])
def test_contract(
    family: str,
    layout: str,
    check: contract.Check,
    model: Callable[[str], Path],
    ranks: Callable[[Path, str], RankProcesses],
    tiny_model_dir: Path,
) -> None:
    directory = tiny_model_dir if family == "qwen3" else model(family)
    check(cast("contract.Factory", ranks(directory, layout).backend))
