"""How tests are shared out where several processes run them at once: `pytest -n 2`.

The files of a group share something that is there once (port 8000) or takes long to make (a server, groups of ranks):
one process runs them all. Of the rest, each file is run by one process. What takes longest begins first, so that the
processes end at about the same time.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest

LIVE_SERVER = "the server on port 8000"

# Beginning of a test's id -> its group, in the order in which they begin; other files are groups of their own.
GROUPS = {
    "tests/sdk/": LIVE_SERVER,
    "tests/verbs/": LIVE_SERVER,
    "tests/e2e/test_health.py": LIVE_SERVER,
    "tests/e2e/test_tenants.py": LIVE_SERVER,
    "tests/mission/test_mission_scripts.py": LIVE_SERVER,
    "tests/mission/test_tinker_cookbook.py": LIVE_SERVER,
    "packages/twinkle-megatron/": "ranks",
    "tests/e2e/test_several_ranks.py": "servers of several ranks",
    "tests/e2e/test_quickstart.py": "quick start",
    "tests/mission/test_twinkle_cookbook.py": "the cookbook's server",
    "tests/docs/test_examples.py": "the cookbook's server",
    "tests/e2e/test_several_models.py": "several models",
    "tests/mission/test_second_yaml.py": "the second YAML",
    "tests/e2e/": "other servers",
    "packages/twinkle-server/tests/backends/": "backends",
    "tests/packaging/": "wheels",
}
_ORDER = list(dict.fromkeys(GROUPS.values()))


def group_of(nodeid: str) -> str:
    return next(
        (name for start, name in GROUPS.items() if nodeid.startswith(start)), nodeid.partition("::")[0]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "live_server" in getattr(item, "fixturenames", ()) and group_of(item.nodeid) != LIVE_SERVER:
            raise pytest.UsageError(f"{item.nodeid} uses live_server: add its file to {__file__}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {name: number for number, name in enumerate(_ORDER)}
        items.sort(key=lambda item: place.get(group_of(item.nodeid), len(place)))


_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[group_of(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which groups take longest: with `--durations`, as the single tests that do."""
    if not terminalreporter.config.option.durations:
        return
    terminalreporter.section("slowest groups")
    slowest = sorted(_seconds.items(), key=lambda item: -item[1])
    for name, seconds in slowest[: terminalreporter.config.option.durations]:
        terminalreporter.write_line(f"{seconds:.0f}s {name}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
