"""Groups of ranks on tiny models, one for each layout that a test asks for, kept for the whole session."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron_ranks
import pytest
import tiny_models
from rank_processes import RankProcesses

from twinkle.server.backends.protocol import ModelConfig

# Enough for one test of all layouts; a group takes half a second to start.
KEPT_GROUPS = 6

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_parallel_size": 2},
    "PP2": {"pipeline_parallel_size": 2},
    "TP2xPP2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "TP2+SP": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "EP2": {"expert_parallel_size": 2},
    "TP2xEP2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "PP2xEP2": {"pipeline_parallel_size": 2, "expert_parallel_size": 2},
    "DP2": {"data_parallel_size": 2},
    "DP2xTP2": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "DP2xPP2": {"data_parallel_size": 2, "pipeline_parallel_size": 2},
    "DP2xEP2": {"data_parallel_size": 2, "expert_parallel_size": 2},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model("qwen3")`: the directory of a tiny model of that family."""
    saved: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in saved:
            saved[family] = tiny_models.save(family, tmp_path_factory.mktemp(family))
        return saved[family]

    return get


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., RankProcesses]]:
    """`ranks(model directory, layout)`: a group that is there already, or a new one. The latest few are kept."""
    groups: OrderedDict[tuple[Path, str], RankProcesses] = OrderedDict()

    def get(path: Path, layout: str) -> RankProcesses:
        key = path, layout
        if key not in groups:
            while len(groups) >= KEPT_GROUPS:
                groups.popitem(last=False)[1].stop()
            groups[key] = megatron_ranks.start(ModelConfig(path, **LAYOUTS[layout]))
        groups.move_to_end(key)
        return groups[key]

    yield get
    for group in groups.values():
        group.stop()
